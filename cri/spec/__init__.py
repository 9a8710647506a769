"""From a CRI request and an image config to an OCI runtime-spec config.json. Pure but for reads of host facts."""
