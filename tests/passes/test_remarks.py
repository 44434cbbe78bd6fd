"""Remarks: stable IDs, JSON in and out, text, and what an ID means."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.passes import remarks
from plait.passes.remarks import Remark

ROOT = Path(remarks.__file__).parent.parent
text = st.text(max_size=12)
any_remark = st.builds(
    Remark,
    id=st.from_regex(r"PLT-[A-Z]{3}-[0-9]{3}", fullmatch=True),
    kind=st.sampled_from(("done", "missed", "note")),
    pass_name=text,
    nodes=st.lists(text, max_size=3).map(tuple),
    reason=text,
    hint=text,
    predicted_gain=st.none() | st.floats(allow_nan=False),
)


@given(any_remark)
def test_json_round_trip_keeps_everything(item):
    assert Remark.from_json(json.loads(json.dumps(item.to_json()))) == item


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"idd": 3}, "unknown field of a remark: idd"),
        ({"id": 3}, "must be strings"),
        ({"nodes": [1]}, "list of names"),
        ({"predicted_gain": "1"}, "number or null"),
    ],
)
def test_bad_json_says_what_is_wrong(data, message):
    with pytest.raises(ValueError, match=message):
        Remark.from_json(data)


def test_the_catalogue_has_every_id_used_anywhere_and_no_other():
    used = set()
    for layer in ("bench", "compiler", "kernels", "passes", "runtime"):
        for path in (ROOT / layer).rglob("*.py"):
            if path != Path(remarks.__file__):
                used |= set(re.findall(r'"(PLT-[A-Z]{3}-\d{3})"', path.read_text("utf-8")))
    assert used and used == set(remarks.CATALOGUE), used ^ set(remarks.CATALOGUE)


def test_every_id_that_the_docs_name_is_in_the_catalogue():
    named = set()
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named |= set(re.findall(r"PLT-[A-Z]{3}-\d{3}", path.read_text("utf-8")))
    assert named and named <= set(remarks.CATALOGUE), named - set(remarks.CATALOGUE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "PLT-1"}, "not of the form PLT-ABC-123"),
        ({"kind": "lost"}, "not one of done, missed, note"),
        ({"nodes": "conv"}, "tuple of names"),
    ],
)
def test_malformed_fields_are_refused(fields, message):
    good = {"id": "PLT-FUS-001", "kind": "done", "pass_name": "p", "nodes": (), "reason": ""}
    with pytest.raises(ValueError, match=message):
        Remark(**{**good, **fields})


def test_text_merges_equal_remarks_and_counts_kinds():
    items = [
        Remark("PLT-FUS-002", "missed", "fuse-vertical", (name,), "no lowering", "wait", 2e-6)
        for name in ("a", "b", "c", "d")
    ]
    items.append(Remark("PLT-NRM-008", "done", "normalize", ("e",), "gone"))
    assert remarks.render(items) == (
        "- PLT-FUS-002 fuse-vertical [a, b, c and 1 more]: no lowering (predicted +8.0 us)\n"
        "    hint: wait\n"
        "+ PLT-NRM-008 normalize [e]: gone\n"
        "1 done, 4 missed, 0 note"
    )
    assert remarks.render(items, kinds=["done"]).startswith("+ PLT-NRM-008")


def test_explain_knows_ids_and_names_near_ones_when_asked_for_another():
    assert "library" in remarks.explain("PLT-FUS-002")
    with pytest.raises(LookupError, match="'PLT-FUS-999': did you mean PLT-FUS-0"):
        remarks.explain("PLT-FUS-999")
