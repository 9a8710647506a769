"""The commands of `ocirun`, a module for each group: FLAGS and WORDS by command, and `run(context, name, values)`."""
