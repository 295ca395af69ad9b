"""`prefopt bundle STUDY`: a finished comparison as one archive to publish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prefopt.bundle import bundle
from prefopt.cli.flags import parameter_defaults
from prefopt.machine import standard_console

_HELP = """Packs results, report, figures, tables, every cell's config, environment and metrics, the versions and licences of \
all installed packages, and checksums. No weights and no data."""


def build(tokens: Sequence[str]) -> App:
    """`bundle`."""
    app = App("bundle", version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext", help=_HELP)

    def run(
        study: Annotated[Path, Parameter(help="Folder of a finished comparison.")],
        /,
        *,
        output: Annotated[Path | None, Parameter(help="The archive (STUDY.zip).")] = None,
        anonymous: Annotated[
            bool, Parameter(help="Replace paths by their last part, and the user's home and name.", negative="")
        ] = False,
    ) -> None:
        target = output or study.resolve().with_suffix(".zip")
        names = bundle(study, target, anonymous=anonymous)
        size = target.stat().st_size / 2**20
        standard_console().print(f"{len(names)} files, {size:.1f} MiB: {target}", highlight=False, soft_wrap=True)

    app.default(run)
    return app
