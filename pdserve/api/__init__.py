"""The public gRPC API. `v1` is generated from proto/pdserve/api/v1 by tools/make_stubs.py."""
