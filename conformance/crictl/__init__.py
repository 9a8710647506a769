"""The real crictl, used as a person would, against whatever serves a socket."""
