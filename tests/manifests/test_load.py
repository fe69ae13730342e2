"""A manifest is read strictly, and everything wrong with it is said at once, with positions."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import ManifestError, NotFoundError
from magnetar.manifests.load import MAX_REPORTED, load_deployment, parse_deployment
from magnetar.manifests.placement import Placement
from magnetar.manifests.schema import Deployment, Serve

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "manifests" / "examples"
HEAD = "apiVersion: magnetar/v1\nkind: Deployment\nmetadata: {name: x}\n"
MINIMAL = HEAD + "spec:\n  source:\n    catalogue: mixtral-8x7b\n"
MAGNET = "magnet:?xt=urn:btih:" + "ab" * 20


def parse(text: str, **environment: str) -> Deployment:
    return parse_deployment(text.encode(), name="x.yaml", environment=environment)


def complaints(text: str) -> list[str]:
    with pytest.raises(ManifestError) as raised:
        parse(text)
    return str(raised.value).splitlines()


def test_defaults_fill_in_all_but_the_source() -> None:
    deployment = parse(MINIMAL)
    assert deployment.spec.placement == Placement()
    assert deployment.spec.serve == Serve()
    assert deployment.spec.serve.host == "127.0.0.1"


def test_key_without_entries_means_the_defaults() -> None:
    assert parse(MINIMAL + "  serve:\n  placement:\n").spec.serve == Serve()


def test_every_example_loads() -> None:
    files = sorted(set(EXAMPLES.glob("*.yaml")) - {EXAMPLES / "inventory.yaml"})
    assert {"demo.yaml", "mixtral-8x7b.yaml"} <= {file.name for file in files}
    for file in files:
        deployment = load_deployment(file, environment={"MAGNET": MAGNET})
        assert deployment.to_spec(base=file.parent).name == file.stem


def test_error_has_place_path_message_source_line_and_caret() -> None:
    assert complaints(MINIMAL + "  serve:\n    prot: 80\n") == [
        "x.yaml:8:5: spec.serve.prot: unknown key 'prot'; did you mean 'port'?",
        "        prot: 80",
        "        ^",
    ]


def test_all_errors_come_at_once_in_the_order_of_the_file() -> None:
    found = complaints(
        "apiVersion: magnetar/v2\n"
        "kind: Deploymnet\n"
        "metadata: {name: Bad_Name}\n"
        "spec:\n"
        "  source: {catalogue: mixtrul, peers: [nowhere]}\n"
        "  model: fp32\n"
        "  placement: {stages: 0, stages: 1}\n"
        "  serve: {port: '80', host: no, maxConcurrency: 012}\n"
    )
    places = [line.split(": ")[:2] for line in found if line.startswith("x.yaml")]
    assert places == [
        ["x.yaml:1:13", "apiVersion"],
        ["x.yaml:2:7", "kind"],
        ["x.yaml:3:18", "metadata.name"],
        ["x.yaml:5:23", "spec.source.catalogue"],
        ["x.yaml:5:40", "spec.source.peers.0"],
        ["x.yaml:6:10", "spec.model"],
        ["x.yaml:7:23", "spec.placement.stages"],
        ["x.yaml:7:26", "spec.placement.stages"],
        ["x.yaml:8:17", "spec.serve.port"],
        ["x.yaml:8:49", "spec.serve.maxConcurrency"],
    ]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{}", "it has none of them"),
        ("{catalogue: mixtral, folder: a}", "it has catalogue and folder"),
        ("{magnet: 'magnet:?dn=x'}", "spec.source.magnet"),
        ("{folder: a, slidingWindow: 0}", "a number of tokens, or none"),
        ("{folder: a, ropeTheta: -1}", "greater than 0"),
        ("{folder: a, chatFormat: chatlm}", "did you mean 'chatml'"),
        ("{folder: a, timeoutSeconds: '5'}", "should be a valid number, not '5'"),
        ("{folder: a, downloadLimit: fast}", "'fast' is no rate: write 500kB"),
    ],
)
def test_source_that_makes_no_sense_is_refused(source: str, complaint: str) -> None:
    assert complaint in "\n".join(complaints(HEAD + f"spec: {{source: {source}}}\n"))


def test_missing_parts_are_named() -> None:
    found = "\n".join(complaints("apiVersion: magnetar/v1\nkind: Deployment\n"))
    assert "metadata: is missing" in found
    assert "spec: is missing" in found


def test_variables_take_the_type_of_what_they_hold_unless_quoted() -> None:
    deployment = parse(MINIMAL + "  serve:\n    port: ${PORT:-1}\n", PORT="8081")
    assert deployment.spec.serve.port == 8081
    with pytest.raises(ManifestError, match="not '8081'"):
        parse(MINIMAL + "  serve:\n    port: '${PORT}'\n", PORT="8081")


def test_long_lines_are_cut_around_the_caret() -> None:
    found = complaints(HEAD + f"spec: {{source: {{folder: {'a' * 5000}, pers: []}}}}\n")
    assert max(map(len, found)) < 160
    assert found[1][found[2].index("^") :].startswith("pers")


def test_a_flood_of_errors_is_cut() -> None:
    found = complaints(MINIMAL + "".join(f"  key{n}: 1\n" for n in range(50)))
    assert sum(line.startswith("x.yaml") for line in found) == MAX_REPORTED
    assert found[-1] == "and 30 more"


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.yaml"):
        load_deployment(tmp_path / "gone.yaml", environment={})


def test_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        load_deployment(tmp_path, environment={})


def test_relative_paths_start_at_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "x.yaml").write_text(
        HEAD + "spec:\n  source: {folder: release}\n  serve: {apiKeyFile: keys/api}\n"
        "  placement: {store: ../store, stages: 2, pipelines: 3, rayAddress: '10.0.0.1:6379'}\n"
    )
    deployment = load_deployment(tmp_path / "x.yaml", environment={})
    spec = deployment.to_spec(base=tmp_path)
    assert spec.source.location == str(tmp_path / "release")
    assert spec.api_key_file == str(tmp_path / "keys" / "api")
    assert Path(spec.store).resolve() == tmp_path.parent / "store"
    assert (spec.num_stages, spec.num_pipelines) == (2, 3)
    assert spec.model_name == "release"
    assert deployment.spec.placement.ray_address == "10.0.0.1:6379"


@pytest.mark.parametrize(
    ("placement", "complaint"),
    [
        ("nodes: [{node: a, layers: abc}]", "nodes.0.layers: 'abc' is no range of layers: write"),
        ("nodes: [{node: a, layers: 9-4}]", "nodes.0.layers: '9-4' ends before it begins"),
        ("nodes: [{node: a}, {node: a}]", "nodes.1.node: a is there already"),
        ("nodes: [{node: a, exclude: true, layers: 0-3}]", "a is excluded, and may have no layers"),
        (
            "nodes: [{node: a, layers: 0-3}, {node: b, layers: 3-5}]",
            "nodes.1.layers: a has layer 3 already",
        ),
        (
            "{nodes: [{node: a, exclude: true}], experts: [{node: a, hold: 0-3/1}]}",
            "experts.0.node: a is excluded, and can hold no experts",
        ),
    ],
)
def test_wishes_that_contradict_stand_where_they_are_in_the_file(
    placement: str, complaint: str
) -> None:
    placement = placement if placement.startswith("{") else f"{{{placement}}}"
    (first, line, caret) = complaints(MINIMAL + f"  placement: {placement}\n")
    assert complaint in first
    assert f"x.yaml:7:{caret.index('^') - 3}: " in first
    assert line.strip().startswith("placement:")


def test_a_file_of_the_other_kind_is_told_where_it_goes() -> None:
    found = complaints(MINIMAL.replace("Deployment", "Inventory"))
    assert "'Inventory' is not 'Deployment'; machines to plan with are given by" in found[0]


def report(text: str) -> str:
    """What is wrong with a manifest; nothing if it is right."""
    try:
        parse(text)
    except ManifestError as error:
        return str(error)
    return "x.yaml: nothing is wrong"


PARTS = ("apiVersion", "kind", "metadata", "name", "spec", "source", "model", "placement", "serve")
FIELDS = ("catalogue", "torrent", "folder", "peers", "port", "host", "dtype", "slidingWindow")
_keys = st.sampled_from(PARTS + FIELDS)
_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | _keys
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=6),
    max_leaves=20,
)


@given(_values)
def test_no_value_raises_anything_but_manifest_error(value: object) -> None:
    assert report(yaml.safe_dump(value, allow_unicode=True)).startswith("x.yaml:")


@given(st.dictionaries(_keys, _values, max_size=4), _keys)
def test_no_spec_raises_anything_but_manifest_error(value: object, key: str) -> None:
    whole = {**yaml.safe_load(MINIMAL), key: value}
    assert report(yaml.safe_dump(whole, allow_unicode=True)).startswith("x.yaml:")


@given(st.text(max_size=200) | st.text(alphabet="apiVersion: {}[]'\"\n-&*!|>%$", max_size=200))
def test_no_text_raises_anything_but_manifest_error(text: str) -> None:
    assert report(text).startswith("x.yaml:")
