"""The credentials of the deployment that tests run, and of a strange one."""

from pdserve.rpc.credentials import Credentials, DeploymentToken

OURS = Credentials(DeploymentToken("the token of all processes that a test starts"))
THEIRS = Credentials(DeploymentToken("the token of another deployment"))
