"""What only shows on another kind of machine than this one may be: `hack/vm` runs these tests in it."""
