"""Takes text on the command line for what it is: typer has every word validated by pydantic, plain text too.

To import pydantic takes longer than all else that ``emp migrate`` does before its request is on its way. What is
neither text nor a flag is still converted by typer.
"""

from __future__ import annotations

import typer.core
from typer._coercion import PassThroughRuntimeParam, RuntimeParam, TypeDescriptor, build_runtime_param


def _build(descriptor: TypeDescriptor) -> RuntimeParam:
    if descriptor.annotation in (str, bool):
        return PassThroughRuntimeParam(parameter_info=descriptor.parameter_info, annotation=descriptor.annotation)
    return build_runtime_param(descriptor)


def spare_text() -> None:
    """Let typer do so from now on, in this process."""
    typer.core.build_runtime_param = _build  # type: ignore[attr-defined]
