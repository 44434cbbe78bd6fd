"""Pipeline text: parsing, printing, and what one is told about mistakes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.passes import registry
from plait.passes.base import Pass, PassResult
from plait.passes.pipeline_print import print_pipeline
from plait.passes.pipeline_text import PipelineError, parse_pipeline


@dataclass(frozen=True)
class Sample(Pass):
    name: ClassVar[str] = "sample"
    count: int = 3
    ratio: float = 0.5
    eager: bool = False
    label: str = "x"
    cap: int | None = None
    sizes: tuple[int, ...] = ()
    words: tuple[str, ...] = ("a",)
    mode: Literal["fast", "small"] = "fast"

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must not be negative")

    def run(self, graph_module):
        return PassResult(graph_module)


@pytest.fixture(autouse=True)
def sample():
    registry.register("sample", Sample, replace=True)
    yield
    registry.unregister("sample")


samples = st.builds(
    Sample,
    count=st.integers(0, 99),
    ratio=st.floats(allow_nan=False),
    eager=st.booleans(),
    label=st.text(),
    cap=st.none() | st.integers(),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    words=st.lists(st.text(), max_size=3).map(tuple),
    mode=st.sampled_from(("fast", "small")),
)


@given(st.lists(samples, max_size=3))
def test_what_is_printed_parses_to_the_same_passes(passes):
    registry.register("sample", Sample, replace=True)
    assert parse_pipeline(print_pipeline(passes)) == tuple(passes)


def test_real_passes_with_options_and_blanks():
    text = " normalize , fuse-vertical{ max-nodes = 40 , rows=false } "
    assert (
        print_pipeline(parse_pipeline(text)) == "normalize,fuse-vertical{rows=false,max_nodes=40}"
    )


def test_the_empty_text_is_the_empty_pipeline():
    assert parse_pipeline("  ") == ()


def test_a_flag_alone_means_true():
    assert parse_pipeline("sample{eager}") == (Sample(eager=True),)


def test_a_single_value_stands_for_a_list_of_one():
    assert parse_pipeline("sample{sizes=4}") == (Sample(sizes=(4,)),)


MISTAKES = [
    ("normalise", 0, "unknown pass 'normalise'; did you mean normalize?"),
    ("sample,zzz", 7, "unknown pass 'zzz'; known: "),
    ("sample{cuont=3}", 7, "pass sample has no option 'cuont'; did you mean count? (its options: "),
    ("sample{zz=3}", 7, "pass sample has no option 'zz' (its options: cap, count, eager"),
    ("sample{count}", 12, "expected '=' and a value for count, which is an integer, found '}'"),
    ("sample{count=many}", 13, "option 'count' of sample is an integer, not many"),
    ("sample{count=1.5}", 13, "is an integer, not 1.5"),
    ("sample{count=[1,2]}", 13, "is an integer, not [1,2]"),
    ('sample{count="1"}', 13, 'is an integer, not "1"'),
    ("sample{eager=yes}", 13, "option 'eager' of sample is true or false, not yes"),
    ("sample{cap=maybe}", 11, "is an integer or none, not maybe"),
    ("sample{sizes=[1,b]}", 13, "is a list of integers, not [1,b]"),
    ("sample{mode=slow}", 12, "is one of fast, small, not slow"),
    ("sample{label=true}", 13, "option 'label' of sample is a text, not true"),
    ("sample{count=1,count=2}", 15, "option 'count' of sample is given twice"),
    ("sample{count=-1}", 0, "pass sample: count must not be negative"),
    ("sample{", 7, "expected an option of sample, found the end"),
    ("sample{count=", 13, "expected a value, found the end"),
    ("sample{count=3", 14, "expected ',' or '}', found the end"),
    ("sample{sizes=[1", 15, "expected ',' or ']', found the end"),
    ("sample sample", 7, "expected ',' or the end, found 'sample'"),
    ("sample}", 6, "expected ',' or the end, found '}'"),
    ("sample,", 7, "expected the name of a pass, found the end"),
    (",sample", 0, "expected the name of a pass, found ','"),
    ("Sample", 0, "'Sample' is no pass name"),
    ('sample{label="ab', 13, "unterminated string"),
    (
        "prefetch-weights,sample,speculate-routes",
        24,
        "pass prefetch-weights has to see what speculate-routes makes: put prefetch-weights behind",
    ),
    ("prefetch-weights{ahead=false},normalize", 30, "has to see what normalize makes"),
    ("fuse-vertical,normalize", 14, "pass fuse-vertical has to see what normalize makes"),
    ("normalize,plan-memory", 10, "plan-memory always runs, after all that can be named here"),
]


@pytest.mark.parametrize(("text", "position", "message"), MISTAKES)
def test_mistakes_are_explained_where_they_are(text, position, message):
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text)
    assert message in str(caught.value)
    assert caught.value.position == position
    assert str(caught.value).endswith(f"\n  {text}\n  {' ' * position}^")


@given(st.text(alphabet='ab{}[]=,"\\- 1', max_size=20))
def test_any_text_parses_or_is_refused_with_a_position(text):
    try:
        parse_pipeline(text)
    except PipelineError as error:
        assert 0 <= error.position <= len(text)
