"""Plan and graph must match one to one; whatever does not is listed, on both sides."""

import pytest
from graph_text import layer_quant, plan_of, read

from dmqexport.errors import BindingError
from dmqexport.quant_plan import AttentionQuant, LayerOp, LayerQuant, QuantPlan
from dmqexport.quant_types import ActivationQuant
from passes.bind import bind, graph_attentions, graph_layers

FLOAT = {"shifted": "float", "light": "float"}
BODY = layer_quant("body", LayerOp.CONV, (2, 1, 1, 1), 4, [None])


def named(name: str, op: LayerOp = LayerOp.CONV) -> LayerQuant:
    return layer_quant(name, op, (2, 1, 1, 1), 4, [None])


def test_layers_are_found_by_name() -> None:
    model = read("qdq_conv.before")
    bindings = bind(model, plan_of(BODY, float_layers=FLOAT))
    assert [node.name for node in bindings.layers["body"].compute] == ["body/Conv"]
    assert bindings.layers["body"].bias is None
    assert set(graph_layers(model.graph)) == {"body", "shifted", "light"}


def test_biases_and_attentions_are_found() -> None:
    model = read("qdq_linear.before")
    layers = graph_layers(model.graph)
    assert layers["to_out"].bias is not None
    assert layers["to_out"].bias.name == "to_out/Add"
    attention = graph_attentions(model.graph)["attention"]
    assert (attention.query_key.name, attention.probability_value.name) == (
        "attention/QueryKey",
        "attention/ProbabilityValue",
    )


@pytest.mark.parametrize(
    ("plan", "reasons"),
    [
        (plan_of(BODY, named("gone"), float_layers=FLOAT), ["plan: gone has no node in the graph"]),
        (plan_of(BODY), [f"graph: {name} is neither planned nor left in float" for name in FLOAT]),
        (
            plan_of(named("body", LayerOp.LINEAR), float_layers=FLOAT),
            ["plan: body is a linear, the graph has Conv"],
        ),
        (
            plan_of(named("gone"), float_layers={"light": "float"}),
            [
                "plan: gone has no node in the graph",
                "graph: body is neither planned nor left in float",
                "graph: shifted is neither planned nor left in float",
            ],
        ),
    ],
    ids=["missing in the graph", "unknown to the plan", "another operator", "all of it"],
)
def test_what_does_not_match_is_listed(plan: QuantPlan, reasons: list[str]) -> None:
    with pytest.raises(BindingError) as caught:
        bind(read("qdq_conv.before"), plan)
    lines = caught.value.message.splitlines()
    assert lines[0] == f"{len(reasons)} layers do not match between plan and graph:"
    assert [line.strip() for line in lines[1:]] == reasons
    assert caught.value.hint is not None


def test_an_attention_that_the_graph_does_not_have_is_listed() -> None:
    fine = ActivationQuant.from_rows(8, [1.0], [128])
    attention = AttentionQuant("attention", fine, fine, fine, fine)
    plan = QuantPlan("", "", [0], 1, (BODY,), (attention,), FLOAT)
    with pytest.raises(BindingError, match="attention attention has no pair of matmuls"):
        bind(read("qdq_conv.before"), plan)


def test_more_nodes_than_segments_are_listed() -> None:
    model = read("qdq_conv.before")
    for node in model.graph:
        node.metadata_props["dmqexport.module"] = "body"
    plan = plan_of(layer_quant("body", LayerOp.CONV, (2, 2, 1, 1), 4, [None, None], [0, 1, 2]))
    with pytest.raises(BindingError, match="body has 3 nodes, expected 1 or 2"):
        bind(model, plan)
