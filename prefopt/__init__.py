"""prefopt: an instrument for comparing preference-optimization algorithms."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prefopt.report.schema import load_results as load_results


def __getattr__(name: str) -> Any:
    """`prefopt.load_results`, imported when it is first used: `import prefopt` itself waits for nothing."""
    if name == "load_results":
        from prefopt.report.schema import load_results

        return load_results
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}; submodules are imported by name, as prefopt.trainer.")
