"""Autoscalers for plans: what a cluster can become, from its node groups."""

from collections.abc import Callable, Sequence

from clipflow_ray.data.resources import Resources


def adds(groups: Sequence[tuple[Resources, int]]) -> Callable[[Sequence[Resources]], bool]:
    """An autoscaler that may add, of each group (node, count), up to `count` nodes."""

    def can_add(bundles: Sequence[Resources]) -> bool:
        free = [dict(node) for node, count in groups for _ in range(count)]
        for bundle in sorted(bundles, key=lambda each: (each.get("GPU", 0), each.get("CPU", 0)), reverse=True):
            for node in free:
                if all(node.get(name, 0) >= amount for name, amount in bundle.items()):
                    for name, amount in bundle.items():
                        node[name] -= amount
                    break
            else:
                return False
        return True

    return can_add
