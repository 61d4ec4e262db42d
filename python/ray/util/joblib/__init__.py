"""joblib on this runtime: `register_ray()`, then `joblib.parallel_backend("ray")`."""

from __future__ import annotations


def register_ray() -> None:
    """Makes the backend "ray" known to joblib.

    Raises:
        ImportError: joblib is not installed.

    Example:
        >>> register_ray()
        >>> with joblib.parallel_config(backend="ray"):
        ...     joblib.Parallel()(joblib.delayed(abs)(x) for x in [-1, 2])
        [1, 2]
    """
    try:
        from joblib.parallel import register_parallel_backend
    except ImportError:
        raise ImportError("register_ray needs joblib: install it, for example by `pip install joblib`") from None
    from ray.util.joblib.ray_backend import RayBackend

    register_parallel_backend("ray", RayBackend)


__all__ = ["register_ray"]
