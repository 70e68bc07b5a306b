"""What the two ends of a transport tell each other in the `endpoint` of its offer and of its choice."""

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pdserve.contract.errors import ProtocolViolation


class Endpoint(BaseModel):
    """Base of such descriptions. They travel as JSON, and what comes is checked field by field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_bytes="base64", val_json_bytes="base64"
    )

    def encode(self) -> bytes:
        return self.model_dump_json().encode()

    @classmethod
    def decode(cls, endpoint: bytes) -> Self:
        """Raises ProtocolViolation."""
        try:
            return cls.model_validate_json(endpoint)
        except ValidationError as error:
            raise ProtocolViolation(f"the peer's endpoint is not understood: {error}") from error
