"""Who may call a server: the deployment's token, certificates, and addresses without them."""

import pickle
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import grpc.aio
import psutil
import pytest

from pdserve.config import TlsConfig
from pdserve.contract.errors import ConfigError, ErrorCode, StreamBroken, Unauthenticated
from pdserve.contract.messages import End
from pdserve.contract.ports import Call, MessageStream
from pdserve.rpc.addresses import UnprotectedAddress, require_private, split_address
from pdserve.rpc.convert import SERVICE
from pdserve.rpc.credentials import Credentials, DeploymentToken, TlsIdentity
from pdserve.rpc.grpc_rpc import TOKEN_KEY, GrpcRpc, GrpcServer
from tests.contract.rpc_pair import OPEN, READY, echo, echo_bytes
from tests.contract.tls_files import commands, make_files
from tests.credentials import OURS, THEIRS

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@dataclass
class Door:
    """A server of ours, and what it has refused."""

    server: GrpcServer
    refused: list[ErrorCode] = field(default_factory=list)
    served: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.server.address


Serve = Callable[[Credentials], Awaitable[Door]]
Open = Callable[..., Awaitable[MessageStream]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    rpcs: list[GrpcRpc] = []
    doors: list[Door] = []

    async def start(credentials: Credentials) -> Door:
        rpcs.append(GrpcRpc(credentials))
        refused: list[ErrorCode] = []
        served: list[str] = []

        async def session(stream: MessageStream) -> None:
            served.append(stream.peer)
            await echo(stream)

        handlers = {Call.SESSION: session, Call.KV: echo_bytes}
        server = await rpcs[-1].serve("127.0.0.1:0", handlers, refused.append)
        doors.append(Door(server, refused, served))
        return doors[-1]

    yield start
    for door in doors:
        await door.server.stop(0)
    for rpc in rpcs:
        await rpc.close()


@pytest.fixture
async def open_as() -> AsyncIterator[Open]:
    rpcs: list[GrpcRpc] = []

    async def open_stream(credentials: Credentials, address: str, call: Call = Call.SESSION) -> MessageStream:
        rpcs.append(GrpcRpc(credentials))
        return await rpcs[-1].open(address, call)

    yield open_stream
    for rpc in rpcs:
        await rpc.close()


async def talk(stream: MessageStream) -> None:
    """A whole conversation."""
    await stream.send(OPEN)
    assert await stream.receive() == READY
    await stream.send(End())
    assert await stream.receive() == End()


# The token


async def test_who_has_the_token_is_served(serve: Serve, open_as: Open) -> None:
    door = await serve(OURS)
    await talk(await open_as(OURS, door.address))
    assert door.refused == []


async def test_another_deployments_call_is_refused_before_its_handler_runs(
    serve: Serve, open_as: Open
) -> None:
    door = await serve(OURS)
    stream = await open_as(THEIRS, door.address)
    with pytest.raises(Unauthenticated, match="does not carry the token of this deployment") as refused:
        await stream.receive()
    assert refused.value.info.code is ErrorCode.UNAUTHENTICATED
    assert door.refused == [ErrorCode.UNAUTHENTICATED]
    assert door.served == []
    await talk(await open_as(OURS, door.address))


@pytest.mark.parametrize("method", [f"/{SERVICE}/Session", f"/{SERVICE}/Nothing", "/of.another/Service"])
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        ((TOKEN_KEY, ""),),
        ((TOKEN_KEY, OURS.token.secret[:-1]),),
        ((TOKEN_KEY, OURS.token.secret), (TOKEN_KEY, OURS.token.secret)),
        ((f"{TOKEN_KEY}-bin", OURS.token.secret.encode()),),
        (("authorization", f"Bearer {OURS.token.secret}"),),
    ],
    ids=["none", "empty", "shorter", "twice", "binary", "elsewhere"],
)
async def test_without_exactly_the_token_no_method_is_even_looked_for(
    serve: Serve, method: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    door = await serve(OURS)
    async with grpc.aio.insecure_channel(door.address) as channel:
        call = channel.stream_stream(method)(metadata=metadata)  # type: ignore[call-arg]
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert door.refused == [ErrorCode.UNAUTHENTICATED]


async def test_a_method_that_is_not_there_is_counted(serve: Serve) -> None:
    door = await serve(OURS)
    async with grpc.aio.insecure_channel(door.address) as channel:
        method = channel.stream_stream(f"/{SERVICE}/Nothing")
        call = method(metadata=((TOKEN_KEY, OURS.token.secret),))  # type: ignore[call-arg]
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert door.refused == [ErrorCode.NOT_FOUND]


def test_a_token_is_never_shown_and_survives_its_journey() -> None:
    token = DeploymentToken.draw()
    again = pickle.loads(pickle.dumps(token))  # as Ray carries actors' arguments
    assert again == token
    assert again.matches(token.secret)
    assert DeploymentToken.draw() != token
    for shown in (repr(token), str(token), f"{Credentials(token)}"):
        assert token.secret not in shown


# Addresses


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.1.1", "::1", "fe80::1", "fd00::1"]
)
async def test_private_hosts_pass(host: str) -> None:
    await require_private(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "100.64.0.1"])
async def test_public_hosts_need_tls(host: str) -> None:
    with pytest.raises(UnprotectedAddress, match=r"not encrypted: configure network\.tls"):
        await require_private(host)


async def test_names_are_judged_by_what_they_mean() -> None:
    await require_private("localhost")
    await require_private("no-such-host.invalid")


@pytest.mark.parametrize(("address", "passes"), [("10.0.0.7", True), ("8.8.8.8", False)])
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_all_interfaces_means_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str, passes: bool
) -> None:
    entry = SimpleNamespace(family=socket.AF_INET, address=address)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [entry]})
    if passes:
        await require_private(host)
    else:
        with pytest.raises(UnprotectedAddress, match=address):
            await require_private(host)


async def test_a_public_address_is_neither_opened_nor_served_without_tls() -> None:
    rpc = GrpcRpc(OURS)
    with pytest.raises(UnprotectedAddress):
        await rpc.open("8.8.8.8:7000", Call.SESSION)
    with pytest.raises(UnprotectedAddress):
        await rpc.serve("8.8.8.8:0", {})
    await rpc.close()


@pytest.mark.parametrize(
    "address",
    ["", "host", ":1", "host:", "host:x", "host:65536", "unix:/run/x", "dns:///a:1", "::1:80", "[a]b:1"],
)
async def test_what_is_no_address_is_not_opened(address: str) -> None:
    rpc = GrpcRpc(OURS)
    with pytest.raises(ConfigError, match="is not an address"):
        await rpc.open(address, Call.SESSION)
    await rpc.close()


def test_addresses_are_split() -> None:
    assert split_address("10.0.0.1:80") == ("10.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)


# TLS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    return make_files(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def strange_files(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    """Of another authority."""
    return make_files(tmp_path_factory.mktemp("tls") / "theirs")


def with_tls(config: TlsConfig, credentials: Credentials = OURS) -> Credentials:
    return Credentials(credentials.token, TlsIdentity.read(config))


@needs_openssl
async def test_control_and_kv_go_over_tls(serve: Serve, open_as: Open, files: TlsConfig) -> None:
    door = await serve(with_tls(files))
    await talk(await open_as(with_tls(files), door.address))
    kv = await open_as(with_tls(files), door.address, Call.KV)
    await kv.send(bytes(1 << 20))
    assert await kv.receive() == bytes(1 << 20)


@needs_openssl
async def test_a_certificate_is_no_token(serve: Serve, open_as: Open, files: TlsConfig) -> None:
    door = await serve(with_tls(files))
    stream = await open_as(with_tls(files, THEIRS), door.address)
    with pytest.raises(Unauthenticated):
        await stream.receive()


@needs_openssl
async def test_plain_and_strange_clients_are_not_heard(
    serve: Serve, open_as: Open, files: TlsConfig, strange_files: TlsConfig
) -> None:
    door = await serve(with_tls(files))
    for credentials in (OURS, with_tls(strange_files)):
        stream = await open_as(credentials, door.address)
        with pytest.raises(StreamBroken):
            await stream.receive()
    assert door.served == []
    await talk(await open_as(with_tls(files), door.address))


@needs_openssl
async def test_a_client_without_a_certificate_is_not_heard(serve: Serve, files: TlsConfig) -> None:
    door = await serve(with_tls(files))
    identity = with_tls(files).tls
    assert identity is not None
    half = grpc.ssl_channel_credentials(identity.authority)
    options = (("grpc.ssl_target_name_override", "pdserve"),)
    async with grpc.aio.secure_channel(door.address, half, options=options) as channel:
        method = channel.stream_stream(f"/{SERVICE}/Session")
        call = method(metadata=((TOKEN_KEY, OURS.token.secret),))  # type: ignore[call-arg]
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert door.served == []


@needs_openssl
async def test_a_client_does_not_believe_a_strange_server(
    serve: Serve, open_as: Open, files: TlsConfig, strange_files: TlsConfig
) -> None:
    door = await serve(with_tls(strange_files))
    stream = await open_as(with_tls(files), door.address)
    with pytest.raises(StreamBroken):
        await stream.receive()
    assert door.served == []


@needs_openssl
async def test_with_tls_every_address_may_be_called(files: TlsConfig) -> None:
    rpc = GrpcRpc(with_tls(files))
    stream = await rpc.open("192.0.2.1:7000", Call.SESSION)
    stream.cancel()
    await rpc.close()


@needs_openssl
def test_wrong_files_are_named_before_anything_starts(
    tmp_path: Path, files: TlsConfig, strange_files: TlsConfig
) -> None:
    other_name = make_files(tmp_path / "other", name="somebody-else")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    cases = [
        (files.model_copy(update={"key": str(tmp_path / "none")}), "cannot read .*none .*every node needs"),
        (files.model_copy(update={"key": strange_files.key}), "are not a certificate and its key"),
        (files.model_copy(update={"certificate": str(garbage)}), "are not a certificate and its key"),
        (files.model_copy(update={"authority": str(garbage)}), r"garbage\.pem holds no certificate"),
        (files.model_copy(update={"authority": strange_files.authority}), "must be signed by"),
        (other_name, "carry the name 'pdserve'"),
    ]
    for config, message in cases:
        with pytest.raises(ConfigError, match=message) as refused:
            TlsIdentity.read(config)
        assert (refused.value.info.param or "").startswith("network.tls.")


def test_the_page_makes_certificates_in_four_commands() -> None:
    assert len(commands()) == 4
