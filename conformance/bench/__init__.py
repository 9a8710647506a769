"""ocid and Debian's containerd on one machine in one run, in turn, as ratios, against the budgets of the design."""
