"""Placement groups: resources reserved together, in bundles, on nodes of a chosen pattern."""

from __future__ import annotations

from typing import Any

from ray._private.context import current, ensure_context
from ray._private.ids import PlacementGroupID
from ray._private.options import check_label_selector, parse_label_selector
from ray._private.ray_constants import RESOURCE_PRECISION

VALID_PLACEMENT_GROUP_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


class PlacementGroup:
    """A placement group; `placement_group` makes one.

    Args:
        id: its id.
        bundle_cache: its bundles, where they are known.
    """

    @staticmethod
    def empty() -> PlacementGroup:
        """The group that stands for none."""
        return PlacementGroup(PlacementGroupID.nil())

    def __init__(self, id: PlacementGroupID, bundle_cache: list[dict[str, float]] | None = None) -> None:
        self.id = id
        self.bundle_cache = bundle_cache

    @property
    def is_empty(self) -> bool:
        """Whether this stands for no group."""
        return self.id.is_nil()

    def ready(self) -> Any:
        """A reference that resolves to this group once all of it is reserved.

        Example:
            >>> ray.get(group.ready(), timeout=60)
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self)
        return _ready_function().options(num_cpus=0, scheduling_strategy=strategy).remote(self)

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Waits until all of it is reserved, at most that long; says whether it is."""
        if timeout_seconds < 0:
            timeout_seconds = 10**8
        return ensure_context().core.wait_placement_group(self.id.binary(), float(timeout_seconds))

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """What each bundle reserves."""
        if self.bundle_cache is None and not self.is_empty:
            table = placement_group_table(self)
            self.bundle_cache = [table["bundles"][index] for index in sorted(table["bundles"])]
        return self.bundle_cache or []

    @property
    def bundle_count(self) -> int:
        """How many bundles it has."""
        return len(self.bundle_specs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"PlacementGroup({self.id.hex()})"

    def __reduce__(self) -> Any:
        return PlacementGroup, (self.id, self.bundle_cache)


_ready: Any = None


def _ready_function() -> Any:
    global _ready
    if _ready is None:
        import ray

        def bundle_reservation_check(group: PlacementGroup) -> PlacementGroup:
            return group

        _ready = ray.remote(bundle_reservation_check)
    return _ready


def placement_group(
    bundles: list[dict[str, float]],
    strategy: str = "PACK",
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: list[dict[str, str]] | None = None,
    topology_strategy: Any = None,
) -> PlacementGroup:
    """Reserves bundles of resources, all or none; returns at once.

    Args:
        bundles: what each bundle reserves.
        strategy: PACK or SPREAD if possible, STRICT_PACK onto one node, STRICT_SPREAD onto as many nodes.
        name: a name for `get_placement_group`.
        lifetime: "detached" to outlive the job.
        _soft_target_node_id: a node to prefer, with STRICT_PACK.
        bundle_label_selector: labels that each bundle's node must have.

    Raises:
        ValueError, TypeError: an argument makes no sense.

    Example:
        >>> group = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="SPREAD")
        >>> ray.get(group.ready())
    """
    if topology_strategy is not None:
        raise NotImplementedError("topology_strategy: placement by the network's topology is not built yet")
    _check_bundles(bundles)
    if strategy not in VALID_PLACEMENT_GROUP_STRATEGIES:
        raise ValueError(
            f"Invalid placement group strategy {strategy}. Supported strategies are: "
            f"{list(VALID_PLACEMENT_GROUP_STRATEGIES)}."
        )
    if lifetime not in (None, "detached"):
        raise ValueError(f"Placement group `lifetime` argument must be either `None` or 'detached'. Got {lifetime}.")
    if not isinstance(name, str):
        raise TypeError(f"the name of a placement group is a string, got {name!r}")
    if _soft_target_node_id and strategy != "STRICT_PACK":
        raise ValueError(f"_soft_target_node_id only works with STRICT_PACK but got {strategy}")
    if bundle_label_selector is not None:
        if not isinstance(bundle_label_selector, list) or len(bundle_label_selector) not in (0, len(bundles)):
            raise ValueError(
                f"bundle_label_selector must be a list of {len(bundles)} selectors, one a bundle; got "
                f"{bundle_label_selector!r}"
            )
        for selector in bundle_label_selector:
            problem = check_label_selector(selector)
            if problem:
                raise ValueError(problem)
    context = ensure_context()
    group_id = context.core.new_placement_group_id()
    cleaned = [{key: float(value) for key, value in bundle.items() if value} for bundle in bundles]
    context.core.create_placement_group(
        {
            "placement_group_id": group_id,
            "bundles": cleaned,
            "strategy": strategy,
            "name": name,
            "detached": lifetime == "detached",
            "namespace": context.namespace,
            "soft_target_node_id": bytes.fromhex(_soft_target_node_id) if _soft_target_node_id else b"",
            "bundle_label_selector": [parse_label_selector(selector) for selector in bundle_label_selector or []],
        }
    )
    return PlacementGroup(PlacementGroupID(group_id), cleaned)


def _check_bundles(bundles: Any) -> None:
    if not isinstance(bundles, list):
        raise ValueError(f"Placement group bundles must be a list, got {type(bundles)}.")
    example = 'Bundles must be a non-empty list of resource dictionaries. For example: `[{"CPU": 1.0}, {"GPU": 1.0}]`.'
    if not bundles:
        raise ValueError(f"{example} Got empty list instead.")
    for bundle in bundles:
        if not isinstance(bundle, dict) or not all(
            isinstance(key, str) and isinstance(value, (int, float)) and not isinstance(value, bool)
            for key, value in bundle.items()
        ):
            raise ValueError(f"{example} Got {bundle!r}.")
        if not any(bundle.values()):
            raise ValueError(
                f"Bundles cannot be an empty dictionary or resources with only 0 values. Bundles: {bundles}"
            )
        for key, value in bundle.items():
            if value < 0 or 0 < value < 1 / RESOURCE_PRECISION:
                raise ValueError(
                    f"The quantity of resource {key} in a bundle must be 0 or at least {1 / RESOURCE_PRECISION}, got "
                    f"{value!r}"
                )


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Gives the reserved resources back; tasks and actors in the group are ended."""
    if not isinstance(placement_group, PlacementGroup):
        raise TypeError(f"remove_placement_group needs a PlacementGroup, got {placement_group!r}")
    ensure_context().core.remove_placement_group(placement_group.id.binary())


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """The group of this name in this namespace. Raises ValueError where there is none."""
    from ray._private import state

    if not placement_group_name:
        raise ValueError("Please supply a non-empty value to get_placement_group")
    namespace = ensure_context().namespace
    for group_id, row in state.query("placement_groups").items():
        if row["name"] == placement_group_name and row["ray_namespace"] == namespace and row["state"] != "REMOVED":
            return PlacementGroup(PlacementGroupID.from_hex(group_id))
    raise ValueError(f"Failed to look up placement group with name: {placement_group_name}")


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """What the control plane knows of one group, or of all by id.

    Raises:
        ValueError: there is no such group.
    """
    from ray._private import state

    rows = state.query("placement_groups")
    tables = {
        group_id: {
            **row,
            "bundles": _by_number(row["bundles"]),
            "bundles_to_node_id": _by_number(row["bundles_to_node_id"]),
        }
        for group_id, row in rows.items()
    }
    if placement_group is None:
        return tables
    if placement_group.id.hex() not in tables:
        raise ValueError(f"The control plane knows no placement group {placement_group.id.hex()}")
    return tables[placement_group.id.hex()]


def _by_number(table: dict[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in table.items()}


def get_current_placement_group() -> PlacementGroup | None:
    """The group that the running task or actor is in; None outside one, and in a driver.

    Raises:
        RuntimeError: the process is not connected.
    """
    from ray._private.worker import WORKER_MODE, global_worker

    if current.context is None:
        global_worker.check_connected()
    if global_worker.mode != WORKER_MODE:
        return None
    group = (global_worker.core.current_strategy() or {}).get("placement_group_id")
    if not group or group == PlacementGroupID.nil().binary():
        return None
    return PlacementGroup(PlacementGroupID(group))
