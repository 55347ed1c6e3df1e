"""The command line: compose the configuration, build, run."""
