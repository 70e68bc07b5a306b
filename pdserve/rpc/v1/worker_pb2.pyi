from pdserve.rpc.v1 import prefill_pb2 as _prefill_pb2
from pdserve.rpc.v1 import session_pb2 as _session_pb2
from pdserve.rpc.v1 import watch_pb2 as _watch_pb2
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor
