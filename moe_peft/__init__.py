"""Multi-task mixture-of-experts parameter-efficient fine-tuning on Lightning. Importing the package costs nothing."""

__version__ = "0.1.0"
