"""Count what checkpointed blocks compute again: each is marked while its graph is listed, and then computed twice.

What the backward pass needs of a block is computed again from the block's input. Ours keeps the output of attention, which is
counted as computed again all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_lora.models.graph import Graph, Node, needed_for

START, END = mx.uint16, mx.int16


def marked(block: Callable[..., mx.array], given: Any, x: mx.array, *others: Any, **named: Any) -> mx.array:
    """Return a block's output, with marks at its start and its end; `given` is what it is called with before its input."""
    return _mark(block(given, _mark(x, START), *others, **named), END)


def _mark(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Mark where a checkpointed block starts or ends, by a view of its array and back."""
    mark = mx.custom_function(lambda x: x.view(dtype).view(mx.bfloat16))
    mark.vjp(lambda _, cotangent, __: cotangent)
    return mark(x)


def computed_twice(graph: Graph) -> Graph:
    """Return a graph whose backward pass computes each marked block again, from the block's input."""
    forward, inside = needed_for(graph, graph.returned), dict[str, Node]()
    starts = {
        name for node in graph.nodes if node.name == "View" and node.arguments == [START] for name in node.outputs
    }
    for node in (graph.nodes[number] for number in sorted(forward)):
        if node.arguments != [END] and any(name in starts or name in inside for name in node.inputs):
            inside |= dict.fromkeys(node.outputs, node)
    nodes, arrays, again = list[Node](), dict(graph.arrays), dict[str, str]()

    def made_again(name: str) -> str:
        if name in inside and name not in again:
            node = inside[name]
            inputs = tuple(map(made_again, node.inputs))
            again.update((output, f"{output} again") for output in node.outputs)
            arrays.update((again[output], arrays[output]) for output in node.outputs)
            nodes.append(node._replace(inputs=inputs, outputs=tuple(again[output] for output in node.outputs)))
        return again.get(name, name)

    for number, node in enumerate(graph.nodes):
        nodes.append(node if number in forward else node._replace(inputs=tuple(map(made_again, node.inputs))))
    return Graph(nodes, arrays, graph.inputs, graph.returned, graph.gradients)
