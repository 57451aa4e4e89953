"""The keys of a model family, one file each, and of the objectives. Light: the driver reads them without torch."""
