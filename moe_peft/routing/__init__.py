"""Who was routed where: recorded while a model runs, as numbers, and as the files of a run's `routing/` folder."""
