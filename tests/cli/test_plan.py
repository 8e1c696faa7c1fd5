from __future__ import annotations

import json


def test_the_plan_lists_the_nodes_in_order(project, safeloop):
    done = safeloop("plan", "digits.yaml")
    assert (done.exit_code, done.stderr) == (0, "")
    places = [done.stdout.index(word) for word in ("zero", "forward", "backward", "finite", "update")]
    assert places == sorted(places)
    assert not (project / "runs").exists()


def test_why_adds_reasons(project, safeloop):
    plain, why = safeloop("plan", "digits.yaml"), safeloop("plan", "digits.yaml", "--why")
    assert why.exit_code == 0
    assert len(why.stdout) > len(plain.stdout)


def test_json_is_json(project, safeloop):
    done = safeloop("plan", "digits.yaml", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["phases"][0]["phase"] == "train"


def test_a_refused_plan_is_one_json_object_where_json_is_wanted(project, safeloop):
    done = safeloop("plan", "digits.yaml", 'optimizers={type: SGD, lr: 0.1, params: ["weight"]}', "--json")
    assert (done.exit_code, done.stdout) == (3, "")
    assert json.loads(done.stderr)["error"]["code"] == "SL201"
