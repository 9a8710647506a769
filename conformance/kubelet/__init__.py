"""A real kubelet on ocid: the programs that conformance/kubelet/go.mod pins, on a node of their own."""
