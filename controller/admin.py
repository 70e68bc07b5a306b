"""How an operator reaches the routers' admin servers."""

from dataclasses import dataclass

from controller.status import SystemStatus
from pdserve.contract.errors import NotFound
from pdserve.rpc.credentials import AdminToken

_PAGE = "/admin/"


@dataclass(frozen=True, slots=True)
class AdminServer:
    """Of one router."""

    id: str
    """The router's."""
    url: str


@dataclass(frozen=True, slots=True)
class AdminAccess:
    """Where the admin servers are, and what they ask for."""

    token: AdminToken
    routers: tuple[AdminServer, ...]

    @classmethod
    def of(cls, status: SystemStatus, token: AdminToken) -> "AdminAccess":
        """Of the routers that serve now."""
        found = [
            AdminServer(process.id, f"http://{process.report.admin_address}")
            for process in status.routers
            if process.report is not None and process.report.admin_address
        ]
        return cls(token, tuple(found))

    def page_url(self, router: AdminServer) -> str:
        """Of its live page. The token is in the fragment, which browsers send to nobody; the page's script
        reads it."""
        return f"{router.url}{_PAGE}#token={self.token.secret}"

    def router(self, router_id: str | None) -> AdminServer:
        """The one with that id; the first where none is given. Raises NotFound."""
        for router in self.routers:
            if router_id in (None, router.id):
                return router
        known = ", ".join(router.id for router in self.routers)
        raise NotFound(
            f"no router {router_id!r} has an admin server: there are {known}"
            if known
            else "no router has an admin server: it is still starting, or router.admin.port is null"
        )
