from __future__ import annotations


def test_a_sound_config_is_ok_and_leaves_no_run_behind(project, safeloop):
    done = safeloop("check", "digits.yaml")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "ok  digits.yaml\n", "")
    assert not (project / "runs").exists()


def test_every_config_mistake_is_shown_at_once(project, safeloop):
    done = safeloop("check", "digits.yaml", "run.seed=-1", "optimizers.main.lrr=1")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "SL101" in done.stderr
    assert "SL104" in done.stderr


def test_a_parameter_without_an_owner_is_refused_with_3(project, safeloop):
    done = safeloop("check", "digits.yaml", 'optimizers={type: SGD, lr: 0.1, params: ["weight"]}')
    assert done.exit_code == 3
    assert "SL201" in done.stderr
    assert "bias" in done.stderr
    assert done.stdout == ""


def test_a_warning_leaves_the_config_ok(project, safeloop):
    done = safeloop("check", "digits.yaml", "optimizers.main.lr=0.0")
    assert done.exit_code == 0
    assert done.stderr.count("SL115 ") == 1
    assert done.stdout.startswith("ok  digits.yaml  (warnings: SL115")


def test_each_value_has_its_origin(project, safeloop, monkeypatch):
    monkeypatch.setenv("SAFELOOP__RUN__SEED", "7")
    done = safeloop("check", "digits.yaml", "run.max_steps=3", "--show-origin")
    assert done.exit_code == 0, done.stderr
    lines = {line.split(" = ")[0].strip(): line for line in done.stdout.splitlines() if " = " in line}
    assert "digits.yaml:1" in lines["run.name"]
    assert "SAFELOOP__RUN__SEED" in lines["run.seed"]
    assert "= 7" in lines["run.seed"]
    assert "= 3" in lines["run.max_steps"]
    assert "command line" in lines["run.max_steps"]
    assert "default" in lines["run.precision"]


def test_origins_are_shown_of_a_config_whose_plan_is_refused(project, safeloop):
    done = safeloop("check", "digits.yaml", 'optimizers={type: SGD, lr: 0.1, params: ["weight"]}', "--show-origin")
    assert done.exit_code == 3
    assert "run.name = " in done.stdout
