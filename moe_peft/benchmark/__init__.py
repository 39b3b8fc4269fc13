"""What adapters cost: times as ratios of one interleaved run, and figures that do not depend on the machine."""
