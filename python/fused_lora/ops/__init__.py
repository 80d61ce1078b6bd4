"""One file an op: contract (schema, fake), backends, autograd Function, public function."""
