"""An API of AWS (EC2, EFS) as a driver calls it: off the event loop, with patience, and with the project's own errors.

botocore's retries are off. They would repeat an order whose reply was lost without looking at what it has done; the
driver looks first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from emp.aws.patience import Pace, Time
from emp.model.errors import (
    BadInput,
    Conflict,
    EmpError,
    Forbidden,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unauthenticated,
    Unavailable,
    Unreachable,
)

CONNECT_S = 3.0
READ_S = 15.0
THROTTLED_S = 60.0
"""for so long a request that is throttled, or reaches nobody, is asked again"""
_AGAIN = Pace(first_s=0.25, share=0.5)
"""each pause half as long again as all before it together: to ask more often only empties the bucket"""

_THROTTLED = frozenset(
    {"RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled", "TooManyRequestsException"}
)
"""refused before anything was done: https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html"""

_REFUSALS: dict[str, tuple[type[EmpError], str, str]] = {
    "InvalidVolume.NotFound": (NotFound, "volume", "see: emp volume list"),
    "InvalidVolumeID.Malformed": (BadInput, "volume", "an id is vol- and 17 hexadecimal digits"),
    "InvalidInstanceID.NotFound": (NotFound, "node", "correct the node's instance id in the configuration"),
    "InvalidInstanceID.Malformed": (BadInput, "node", "correct the node's instance id in the configuration"),
    "InvalidVolume.ZoneMismatch": (Refused, "node", "a volume stays in its Availability Zone; choose a node there"),
    "InvalidAttachment.NotFound": (Conflict, "node", "see where it is attached: emp volume show"),
    "VolumeInUse": (Conflict, "volume", "detach it first"),
    "IncorrectState": (Conflict, "volume", "wait until the volume is available or in use, then ask again"),
    "IncorrectModificationState": (
        Refused, "volume", "AWS still works on its last modification: aws ec2 describe-volumes-modifications",
    ),
    "VolumeModificationRateExceeded": (Refused, "volume", "AWS modifies a volume once in six hours; ask again later"),
    "AttachmentLimitExceeded": (Refused, "node", "detach another volume of this node, or choose another node"),
    "VolumeLimitExceeded": (Refused, "size_bytes", "delete volumes, or have the account's quota raised"),
    "MaxIOPSLimitExceeded": (Refused, "size_bytes", "delete volumes, or have the account's quota raised"),
    "TagLimitExceeded": (Refused, "volume", "remove tags of your own from the volume: AWS takes 50"),
    "UnauthorizedOperation": (Forbidden, "credentials", "give the controller's role this permission"),
    "AuthFailure": (Unauthenticated, "credentials", "check the controller's AWS credentials and its clock"),
    "OptInRequired": (Unauthenticated, "credentials", "the account is not subscribed to EC2"),
}  # fmt: skip
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html"""


Refusals = Mapping[str, tuple[type[EmpError], str, str]]
"""code -> our error, the field to name, what to do"""


class Ec2Api:
    """``client`` makes boto3's client on the first call: where credentials come from is boto3's affair.

    ``service`` and ``refusals`` are for another service than EC2.
    """

    def __init__(
        self,
        client: Callable[[], Any],
        times: Time,
        *,
        throttled_s: float = THROTTLED_S,
        service: str = "EC2",
        refusals: Refusals = _REFUSALS,
    ) -> None:
        self._service = service
        self._refusals = refusals
        self._make = client
        self._made: Any = None
        self._making = asyncio.Lock()
        self._times = times
        self._throttled_s = throttled_s

    async def ask(self, call: str, **parameters: Any) -> dict[str, Any]:
        """Make one call, again while EC2 throttles it or is out of reach, or leaves a question without an answer.

        Raises ``OutcomeUnknown`` when an order was sent and not answered; ``Unavailable`` or ``Unreachable`` when
        patience is at its end and nothing was done; else what EC2 refused, with its code in ``details["code"]``.
        """
        patience = self._times.patience(self._throttled_s, _AGAIN)
        while True:
            try:
                return await self._ask(call, parameters)
            except Unavailable as error:
                last = error
            await patience.pause(last)

    async def _ask(self, call: str, parameters: dict[str, Any]) -> dict[str, Any]:
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        client = await self._client()
        try:
            answer: dict[str, Any] = await asyncio.to_thread(getattr(client, call), **parameters)
        except exceptions.ClientError as error:
            raise self._refused(call, error) from error
        except (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError, exceptions.SSLError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                hint = "name the endpoint's certificate authority in ca_file, if it is not Amazon's"
                raise Refused(
                    f"{self._service}'s endpoint is not trusted: {error}", field="ca_file", hint=hint
                ) from error
            hint = "check the network, the region and the endpoint; nothing was done"
            raise Unreachable(f"{self._service} is out of reach: {error}", hint=hint) from error
        except (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
        ) as error:
            hint = "give the controller AWS credentials: a role, or the environment"
            raise Unauthenticated(
                f"there are no credentials for {self._service}: {error}", field="credentials", hint=hint
            ) from error
        except exceptions.ParamValidationError as error:
            raise BadInput(f"{self._service} does not take that: {error}") from error
        except (exceptions.BotoCoreError, ResponseParserError) as error:
            raise _lost(call, f"{self._service} did not answer {call}: {error}") from error
        return answer

    async def _client(self) -> Any:
        from botocore.exceptions import BotoCoreError

        async with self._making:
            if self._made is None:
                try:
                    self._made = await asyncio.to_thread(self._make)
                except BotoCoreError as error:
                    hint = "check the region, the endpoint and the AWS profile"
                    raise BadInput(
                        f"there is no client for {self._service}: {error}", field="region", hint=hint
                    ) from error
        return self._made

    def _refused(self, call: str, error: Any) -> EmpError:
        name = self._service
        told, status = error.response.get("Error", {}), error.response["ResponseMetadata"]["HTTPStatusCode"]
        code, message = str(told.get("Code", "")), str(told.get("Message", ""))
        if code in _THROTTLED:
            return Unavailable(
                f"{name} throttles {call}: {message}", hint="ask again later; nothing was done", code=code
            )
        if status >= 500:
            return _lost(call, f"{name} failed at {call}: {code or status}")
        kind, field, hint = self._refusals.get(code, (None, None, f"{name}'s message says why"))
        if kind is None:
            kind = BadInput if code.startswith(("Invalid", "Missing", "Unknown", "BadRequest")) else Refused
        return kind(f"{name} refuses {call}: {code}: {message}", field=field, hint=hint, code=code)

    async def aclose(self) -> None:
        if self._made is not None:
            self._made.close()


def code_of(error: EmpError) -> str:
    """Return EC2's own code of a refusal; empty where it was not EC2 that refused."""
    return str(error.details.get("code", ""))


def make_client(
    region: str,
    *,
    endpoint_url: str | None = None,
    ca_file: Path | None = None,
    credentials_file: Path | None = None,
    read_s: float,
    service: str = "ec2",
) -> Any:
    """Return boto3's client for ``service``.

    ``ca_file``: the authority of an endpoint that is not Amazon's. ``credentials_file``: as of the AWS tools, in the
    place of ``~/.aws/credentials``; what stands in the environment goes first, as with them.
    """
    import boto3  # loaded only where it is used: it is large
    from botocore.config import Config
    from botocore.session import Session

    session = Session()
    session.register_component("data_loader", _loader())
    if credentials_file is not None:
        session.set_config_variable("credentials_file", str(credentials_file))
        session.get_component("credential_provider").remove("env")  # else whoever starts the daemon would overrule it

    config = Config(
        connect_timeout=CONNECT_S, read_timeout=read_s, retries={"total_max_attempts": 1}, max_pool_connections=32
    )
    verify = str(ca_file) if ca_file else None
    made = boto3.Session(botocore_session=session)
    return made.client(service, region_name=region, endpoint_url=endpoint_url, verify=verify, config=config)


@cache
def _loader() -> Any:
    """Read botocore's models of the services once, and not for each client: they are megabytes."""
    from botocore.loaders import create_loader

    return create_loader()


def _lost(call: str, message: str) -> EmpError:
    if call.startswith("describe_"):
        return Unavailable(message, hint="ask again: it was only a question")
    return OutcomeUnknown(message, hint="look at the volume before you repeat it, or give the same order again")
