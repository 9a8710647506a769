"""Our verdicts about signed images beside those of containers/image."""
