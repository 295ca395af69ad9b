"""`prefopt.losses` is the package `losses`: the same objects under the distribution's own name."""

import losses as _losses

if not getattr(_losses, "IS_PREFOPT", False):
    raise ImportError(
        f"prefopt needs its own package 'losses', but the import path has another module of that name first: "
        f"{_losses.__file__}. Rename that module, or run from another folder."
    )

from losses import *  # noqa: F403
