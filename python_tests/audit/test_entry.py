"""audit() from folders and names: what it reports, writes and leaves alone."""

import json
from dataclasses import replace

import pytest
import torch
from cases import victim, with_patches_and_positions
from cli_cases import few_steps, files_under, refused, run
from PIL import Image

import r2f_ext.audit.entry as module
from r2f_ext.audit import audit
from r2f_ext.audit.report import NOT_ASKED
from r2f_ext.config import AuditConfig
from r2f_ext.data import images_for, load_images, unseen_rows
from r2f_ext.data.load import DEFAULT_COUNT
from r2f_ext.decoders import Projection, Ridge, RowLMMSE
from r2f_ext.errors import R2FError
from r2f_ext.inversion import label_by_label, near_images
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.routes import registry
from r2f_ext.inversion.routes.amortised_refined import AmortisedRefined
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import Reconstruction

pytestmark = pytest.mark.usefixtures("few_controls")

STEPS = MatchingConfig(steps=2)
GRAY = torch.full((1, 3, 32, 32), 0.5)
CONFIG = AuditConfig(pairs=60, decoder_pairs=40, held_out=10, matching=STEPS, refinement=STEPS)


def test_without_out_nothing_is_written(adapter_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = audit([adapter_folder], proxy="embedded", private="embedded:0", config=CONFIG)
    assert files_under(tmp_path) == []
    (part,) = report.sets
    assert part.name == "one" and len(part.originals) == 1 and part.labels is not None
    assert {"matching", "amortised", "amortised_refined"} <= {found.route for found in part.reconstructions}
    assert not any("adapter_rowspace" in note for note in report.notes)  # its count says why, and nobody named it
    assert report.not_tried["adapter_rowspace"].startswith("Not exact")
    assert report.not_tried["amortised_by_label"] == report.not_tried["gauss_newton"] == NOT_ASKED
    assert report.seconds["total"] >= report.seconds["pairs"]


def test_what_is_loaded_is_shown_before_the_long_stages(adapter_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module.run, "run_audit_stages", lambda *args: pytest.fail("not shown first") if not seen else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        audit([adapter_folder], proxy="embedded", private="embedded", config=CONFIG, on_ready=seen.append)
    (ready,) = seen
    assert len(ready.proxy) == 60 and len(ready.private) == 100 and ready.evidence.steps == 1
    assert "matching" in ready.verdicts


def test_the_sizes_that_ran_are_recorded(adapter_folder, monkeypatch):
    monkeypatch.setattr(module.run, "fit_to_memory", lambda target, victims, count, config: replace(config, held_out=5))
    report = audit([adapter_folder], proxy="embedded", config=CONFIG)
    assert report.first.config.held_out == 5 and report.to_json()["config"]["held_out"] == 5


def test_no_absolute_path_is_in_the_report(embedded, private, tmp_path):
    adapter = victim(embedded, tmp_path / "adapter", private.batch([0]), private.labels[:1])
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(load_images("procedural", count=50).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / f"{i}.png")
    out = tmp_path / "out"
    audit([adapter], proxy=str(images), private=f"{images}:3", out=out, config=CONFIG)
    text = (out / "report.json").read_text()
    report = json.loads(text)
    assert str(tmp_path) not in text and str(tmp_path) not in (out / "report.html").read_text()
    assert report["inputs"]["adapters"] == ["../adapter"] and report["inputs"]["private"] == "../images:3"
    assert list(report["proxies"]) == ["images"] and any("'images' has 50 images" in note for note in report["notes"])


def test_a_refused_search_is_noted(embedded, private, tmp_path):
    moved = victim(embedded, tmp_path / "moved", private.batch([0]), private.labels[:1], steps=4)
    report = audit([moved], proxy="embedded", config=replace(CONFIG, gauss_newton=True))
    assert "gauss_newton" not in [found.route for found in report.sets[0].reconstructions]
    assert any(note.startswith("gauss_newton: ") for note in report.notes)


def test_a_search_starts_from_every_public_image_and_the_pairs_stay_as_they_are(adapter_folder):
    """Without private images; the figures of the pair stage do not depend on the further images."""
    named = replace(CONFIG, routes=("amortised",))
    plain = audit([adapter_folder], proxy="embedded", config=named)
    report = audit([adapter_folder], proxy="embedded", config=replace(named, routes=("amortised_by_label",)))
    start, found = report.sets[0].reconstructions
    assert [start.route, found.route] == ["amortised", "amortised_by_label"]
    torch.testing.assert_close(start.images, plain.sets[0].reconstructions[0].images)
    public = load_images("embedded")
    assert round(found.details["pairs_a_victim"]) == (public.labels == start.labels[0]).sum() > 900
    assert report.first.config.start_images == len(public) and plain.first.config.start_images is None
    assert report.seconds["amortised_by_label"] > 0
    data = report.to_json()
    assert AuditConfig.from_json(data["config"]) == report.first.config
    assert "amortised_by_label" in data["reconstruction"]["one"]["routes"]


def test_images_that_do_not_fit_into_memory_are_left_out_and_the_route_says_so(adapter_folder):
    config = replace(CONFIG, routes=("amortised_by_label",), start_images=150)
    report = audit([adapter_folder], proxy="embedded", config=config)
    found = report.sets[0].reconstructions[1]
    assert round(found.details["pairs_a_victim"]) == 150 and "no more than 150 were used, as many as fit" in found.why


def test_all_generated_images_that_were_asked_for_serve_the_start(adapter_folder, monkeypatch):
    monkeypatch.setitem(DEFAULT_COUNT, "proxy", 30)
    report = audit([adapter_folder], proxy="procedural", config=replace(CONFIG, routes=("amortised_by_label",)))
    assert round(report.sets[0].reconstructions[-1].details["pairs_a_victim"]) == CONFIG.pairs > 30


def test_a_generated_proxy_is_searched_for_images_near_the_estimate(adapter_folder, monkeypatch):
    monkeypatch.setitem(DEFAULT_COUNT, "proxy", 30)
    monkeypatch.setattr(near_images, "GENERATED", 700)
    report = audit([adapter_folder], proxy="procedural", config=replace(CONFIG, routes=("amortised_nearby",)))
    *_, first, second = report.sets[0].reconstructions
    assert (first.route, second.route) == ("amortised_by_label", "amortised_nearby")
    assert second.details["near_pairs"] == 700 and round(first.details["pairs_a_victim"]) == 60


def test_no_private_image_among_generated_ones_makes_a_pair(adapter_folder, monkeypatch):
    private, used, made = load_images("embedded", role="private", count=1), [], label_by_label._inverter
    pool = replace(load_images("embedded", count=300), random_labels=True)
    pool = replace(pool, images=torch.cat([private.images, pool.images]), labels=torch.zeros(301, dtype=torch.int64))
    monkeypatch.setitem(DEFAULT_COUNT, "proxy", 30)
    monkeypatch.setattr(module, "generated_nearby", lambda base, proxy, seed: pool)

    def recording(target, a, proxy, *others):
        used.append(len(proxy) - len(unseen_rows(proxy.images, private.images)))
        return made(target, a, proxy, *others)

    monkeypatch.setattr(label_by_label, "_inverter", recording)
    config = replace(CONFIG, routes=("amortised_nearby",))
    audit([adapter_folder], proxy="procedural", private="embedded:0", config=config)
    assert used == [0, 0]  # of the first and of the second estimate
    audit([adapter_folder], proxy="procedural", config=config)
    assert used[2:] == [0, 1]  # nobody said that it is private


def test_a_proxy_that_cannot_be_loaded_whole_leaves_the_start_to_the_pairs(adapter_folder, monkeypatch):
    def limited(base, spec, *, count=None, **options):
        if count is None:
            raise R2FError("too many images.")
        return images_for(base, spec, count=count, **options)

    monkeypatch.setattr(module, "images_for", limited)
    config = replace(CONFIG, routes=("amortised", "amortised_by_label"))
    report = audit([adapter_folder], proxy="embedded", config=config)
    assert [found.route for found in report.sets[0].reconstructions] == ["amortised"]
    assert any("from the proxy pairs, not from all public images: too many images." in note for note in report.notes)
    assert any("public images that the proxy pairs leave unused" in note for note in report.notes)


def test_kept_searches_are_removed_with_the_report_written(adapter_folder, tmp_path):
    old = tmp_path / f"search-gauss_newton-{'0' * 64}.safetensors"
    old.write_bytes(b"")
    audit([adapter_folder], proxy="embedded", config=replace(CONFIG, routes=("amortised",)), out=tmp_path)
    assert not old.exists() and (tmp_path / "report.json").exists()


def test_kept_searches_stay_where_a_route_failed(adapter_folder, tmp_path, monkeypatch):
    """The run that goes on with them is the one after the cause is removed."""
    old = tmp_path / f"search-gauss_newton-{'0' * 64}.safetensors"
    old.write_bytes(b"")
    monkeypatch.setattr(AmortisedRefined, "run", lambda *_: (_ for _ in ()).throw(R2FError("no memory is left.")))
    report = audit(
        [adapter_folder], proxy="embedded", config=replace(CONFIG, routes=("amortised_refined",)), out=tmp_path
    )
    assert old.exists() and (tmp_path / "report.json").exists()
    assert any("Failed: no memory is left." in note for note in report.notes)


def test_the_random_state_of_the_caller_is_left_alone(adapter_folder):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    audit([adapter_folder], proxy="embedded", config=CONFIG)
    assert torch.equal(torch.rand(2), expected)


def test_bad_inputs_are_refused_before_the_long_stages(adapter_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module.run, "run_audit_stages", lambda *args: pytest.fail("the audit ran"))
    for given, sentence in (({"proxy": "none"}, "unknown images"), ({"private": "embedded:100"}, "counted from 0")):
        with pytest.raises(R2FError, match=sentence):
            audit([adapter_folder], config=CONFIG, **given)


@pytest.mark.parametrize(
    ("routes", "sentence"),
    [
        ((), "name at least one"),
        (("nope",), "there is no route 'nope'"),
        (("patch_position",), "patch_position: Not run: it needs exact gradients"),
        (("adapter_rowspace",), "adapter_rowspace: Not exact"),
    ],
)
def test_a_choice_of_routes_of_which_none_can_run_is_refused_before_the_long_stages(
    routes, sentence, adapter_folder, monkeypatch
):
    monkeypatch.setattr(module.run, "generate", lambda *args: pytest.fail("time was spent first"))
    with pytest.raises(R2FError, match=sentence):
        audit([adapter_folder], proxy="embedded", config=replace(CONFIG, routes=routes))


def test_a_report_needs_no_amortised_route(adapter_folder, tmp_path, monkeypatch):
    """Controls and pairing use the amortised estimate, whichever routes ran."""
    matching = registry()["matching"]
    monkeypatch.setattr(type(matching), "after", ())
    monkeypatch.setattr(
        type(matching), "run", lambda self, problem, advance: Reconstruction("matching", GRAY, None, "test", 0.0)
    )
    config = replace(CONFIG, routes=("matching",))
    report = audit([adapter_folder], proxy="embedded", private="embedded", config=config, out=tmp_path)
    (figures,) = report.to_json()["reconstruction"].values()
    assert list(figures["routes"]) == ["matching"] and figures["n"] == 1 and figures["controls"]


@pytest.mark.parametrize(
    ("named", "words"),
    [({"initial": "no-such-folder"}, "no-such-folder"), ({"a0_seed": 12345}, "--a0-seed 12345 does not draw the A")],
)
def test_a_start_that_is_not_the_adapters_is_refused_before_images_are_read(named, words, adapter_folder, monkeypatch):
    monkeypatch.setattr(module, "images_for", lambda *args, **kwargs: pytest.fail("images were read first"))
    with pytest.raises(R2FError, match=words):
        audit([adapter_folder], proxy="embedded", config=CONFIG, **named)


def test_the_recorded_sizes_are_those_that_ran(adapter_folder):
    report = audit([adapter_folder], proxy="embedded", config=replace(CONFIG, decoder_pairs=6000, held_out=100))
    assert (report.first.config.pairs, report.first.config.decoder_pairs, report.first.config.held_out) == (60, 45, 15)


@pytest.fixture
def no_pairs(monkeypatch):
    """The pair stage runs out of memory."""

    def batches(self, *part):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(GeneratedPairs, "batches", batches)


SENTENCE = "No proxy pairs could be made, so nothing that needs them was done: out of memory."


@pytest.mark.parametrize("given", [(), ("--private", "embedded:0")])
def test_without_pairs_the_report_says_so_everywhere_and_the_command_exits_with_3(
    adapter_folder, tmp_path, no_pairs, given, capsys
):
    assert run("audit", adapter_folder, "--proxy", "embedded", "--count", 60, *given, "--out", tmp_path) == 3
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"r2f audit: the report is incomplete: n{SENTENCE[1:]}"]
    assert files_under(tmp_path) == ["report.html", "report.json"]
    report, page = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.html").read_text()
    assert report["failed"] == {"pairs": SENTENCE} and report["incomplete"].endswith(SENTENCE[1:])
    assert report["verdict"]["leak"] is None and report["verdict"]["tried"] == [] and report["decoders"] == {}
    assert report["verdict"]["sentences"][0] == f"Not judged: n{SENTENCE[1:]}" and report["spectra"]
    assert any(f"n{SENTENCE[1:]}" in each["why"] for each in report["verdict"]["not_tried"])
    for said in (SENTENCE, f"Not judged: n{SENTENCE[1:]}", "No route ran, so there are no reconstructions", "none"):
        assert said in page
    for said in (SENTENCE, "no route ran", f"not tried: amortised: Not run: n{SENTENCE[1:]}"):
        assert said in printed.out
    assert "without private images there is no PSNR" not in printed.out and "No private images" not in page


def test_a_decoder_that_fails_is_said_and_there_is_no_file_of_decoded_gradients(
    adapter_folder, tmp_path, monkeypatch, capsys
):
    few_steps(monkeypatch)
    monkeypatch.setattr(Ridge, "finish", lambda self: torch.linalg.cholesky(-torch.eye(2)))
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "gradients.safetensors").write_text("of the old report")
    assert run("audit", adapter_folder, "--proxy", "embedded", "--count", 60, "--out", tmp_path) == 0
    said = "The decoder ridge failed, so there are no decoded gradients: a matrix cannot be decomposed ("
    assert files_under(tmp_path) == ["reconstructions.png", "report.html", "report.json"]
    report, page = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.html").read_text()
    assert said in capsys.readouterr().out and said in page and report["failed"]["ridge"].startswith(said)
    assert all(set(kinds) == {"projection", "row_lmmse"} for kinds in report["decoders"].values())
    assert report["incomplete"] is None and "amortised_refined" in report["verdict"]["tried"]
    (why,) = (each["why"] for each in report["verdict"]["not_tried"] if each["route"] == "matching")
    assert why.startswith(f"Not run: t{said[1:]}") and "gradients.safetensors" not in page


def test_all_decoders_that_fail_leave_a_page(adapter_folder, tmp_path, monkeypatch):
    for kind in (Projection, RowLMMSE, Ridge):
        monkeypatch.setattr(kind, "start", lambda self, *args: torch.linalg.cholesky(-torch.eye(2)))
    report = audit([adapter_folder], proxy="embedded", config=replace(CONFIG, routes=("amortised",)), out=tmp_path)
    assert set(report.failed) == {"projection", "row_lmmse", "ridge"}
    assert "No gradients were decoded in this audit" in (tmp_path / "report.html").read_text()


def test_a_replay_into_its_own_folder_that_fails_keeps_the_report(adapter_folder, tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    path = tmp_path / "report.json"
    audit([adapter_folder], proxy="embedded", config=replace(CONFIG, routes=("amortised",)), out=tmp_path)
    recorded = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(module.run, "run_audit_stages", stop)
        line = refused(capsys, "audit", "--replay", path, "--out", tmp_path, code=130)
    date = json.loads(recorded)["date"]
    assert line.endswith(
        f"The report of an earlier run, of {date}, is kept as previous-report.json and previous-report.html."
    )
    assert not path.exists() and (tmp_path / "previous-report.json").read_text() == recorded
    assert run("audit", "--replay", tmp_path / "previous-report.json", "--out", tmp_path) == 0
    kept = {"gradients.safetensors", "reconstructions.png", "report.html", "report.json"}
    assert set(files_under(tmp_path)) == kept
    again = json.loads(path.read_text())
    assert again["config"] == json.loads(recorded)["config"] and again["inputs"] == json.loads(recorded)["inputs"]


def test_without_pairs_a_closed_form_still_runs_and_is_scored(adapter_folder, embedded, private, tmp_path, no_pairs):
    image, label = private.batch([0]), private.labels[:1]
    folder = with_patches_and_positions(adapter_folder, tmp_path / "a", embedded, image, label)
    report = audit([folder], proxy="embedded", private="embedded:0", config=CONFIG, out=tmp_path / "out")
    assert report.tried == ["patch_position"] and report.failed == {"pairs": SENTENCE}
    verdict = report.verdict  # the closed form bounds its own error, so nothing that failed is needed
    assert verdict.leak is True and verdict.sentences[0].startswith("Recovered exactly by patch_position")
    assert verdict.sentences[1] == f"Not judged: n{SENTENCE[1:]}" and report.incomplete is None
    (figures,) = report.to_json()["reconstruction"].values()
    assert figures["routes"]["patch_position"]["psnr_db_mean"] > 60 and figures["controls"] == {}
    assert "reconstructions.png" in files_under(tmp_path / "out")
    assert "Controls: what is known" not in (tmp_path / "out" / "report.html").read_text()
