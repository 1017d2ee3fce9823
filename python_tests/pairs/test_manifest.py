"""Which shards a recipe has, and manifests that cannot be read. What differs between recipes: test_shards.py."""

import json

import pytest

from r2f_ext.errors import R2FError
from r2f_ext.pairs.manifest import read_manifest, run_of, shards_of, size_of


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (8, [4, 4]), (9, [4, 4, 1])])
def test_shards_hold_all_pairs_and_only_the_last_one_is_smaller(count, sizes):
    recipe = {"count": count, "batch_groups": 4}
    assert [size_of(shard, recipe) for shard in shards_of(recipe)] == sizes


def test_equal_recipes_are_one_run_whatever_the_order_of_their_keys():
    assert run_of({"count": 3, "dense": False}) == run_of({"dense": False, "count": 3})
    assert run_of({"count": 3}) != run_of({"count": 4})


@pytest.mark.parametrize("content", ["", "[]", "{", json.dumps({"schema": 3}), json.dumps({"shards": []}), '"\\ud800"'])
def test_a_manifest_that_is_none_is_said_to_be_damaged(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(R2FError, match="damaged") as caught:
        read_manifest(path)
    assert "run r2f pairs again" in str(caught.value)
