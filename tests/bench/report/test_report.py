"""Rows to numbers, tables and a page: sums by hand, hostile text, size, nothing from outside."""

import json
import math
import re

import msgspec
import pytest
from PIL import Image

from errata.bench.report import curves, summary, tables
from errata.bench.report import page as report
from errata.bench.report import page as report_html
from errata.bench.report.published import matching_results, published_results
from errata.bench.storage.log_records import PROGRESS, RESULTS, LegKey, UnitRecord, UnitState
from errata.bench.storage.results_log import ProbeAnswer
from errata.functional.errors import InvalidInputError
from errata.functional.metrics.conventions import PROBES, SCORERS
from tests.bench.storage.results_logs import row


def lines_of(rows):
    ((leg, lines),) = summary.summarize(rows).items()
    return leg, lines


# ------------------------------------------------------------------ numbers
def test_a_mean_is_over_cases_of_the_mean_over_a_cases_queries():
    rows = [row("a", "portability_1hop", s, index=i) for i, s in enumerate([1.0, 1.0, 0.0, 0.0])]
    rows.append(row("b", "portability_1hop", 1.0))
    _, (line,) = lines_of(rows)
    cell = line.probes["portability_1hop"]
    assert cell.score.mean == 0.75  # pooled it would be 0.6
    assert cell.score.count == 2
    assert line.cases == 2


def test_exact_matches_and_free_generation_stand_beside_the_score():
    said = ProbeAnswer(
        text="Rome",
        accuracy=1.0,
        exact_match=True,
        nll=0.1,
        generation="Rome is",
        generation_match=False,
    )
    rows = [row("a", after=said), row("b", score=0.5)]
    _, (line,) = lines_of(rows)
    cell = line.probes["reliability"]
    assert (cell.score.mean, cell.exact_match.mean, cell.generation_match.mean) == (0.75, 0.5, 0.0)
    assert (cell.exact_match.low, cell.exact_match.high, cell.exact_match.count) == (0.0, 1.0, 2)
    assert cell.generation_match.count == 1
    assert cell.generation_match_before is None


def test_what_is_said_freely_is_in_the_numbers_of_every_probe():
    before = ProbeAnswer(
        text="Paris", accuracy=0, exact_match=False, nll=math.log(8), ngram_entropy=1.5
    )
    after = ProbeAnswer(
        text="Rome", accuracy=1, exact_match=True, nll=math.log(2), ngram_entropy=1.0
    )
    sure = msgspec.structs.replace(after, nll=math.log(8), ngram_entropy=None)
    rows = [
        row("a", before=before, after=after, kl=0.5, ppl_r=2.0),
        row("b", before=before, after=sure, kl=0.7),
        row("a", "text_locality", kl=0.01, generation_unchanged=True),
        row("b", "text_locality", kl=0.03, generation_unchanged=False),
    ]
    _, (line,) = lines_of(rows)
    cell = line.probes["reliability"]
    assert cell.ppl.mean == pytest.approx(4)  # exp of the mean, not 5, the mean of exps
    assert cell.ppl_before.mean == pytest.approx(8)
    assert (cell.ppl_r.mean, cell.ppl_r.count) == (2.0, 1)
    assert (cell.fluency.mean, cell.fluency.count, cell.fluency_before.mean) == (1.0, 1, 1.5)
    assert cell.kl.mean == pytest.approx(0.6)
    kept = line.probes["text_locality"]
    assert (kept.generation_match.mean, kept.kl.mean) == (0.5, pytest.approx(0.02))
    assert kept.ppl is kept.fluency is None
    assert tables.table(rows).splitlines()[-1].split() == ["generation", "50.0"]
    (leg,) = summary.summary_json(rows)["legs"]
    assert leg["editors"][0]["probes"]["text_locality"]["generation_match"]["mean"] == 0.5


def test_a_probe_that_was_not_asked_has_no_cell_and_none_is_left_out():
    _, (line,) = lines_of([row("a", "reliability", 1.0), row("a", "rephrase", None)])
    assert "image_rephrase" not in line.probes
    assert line.probes["rephrase"].score.count == 0
    assert "–" in tables.table([row("a"), row("a", "rephrase", None)])


def test_legs_are_kept_apart():
    rows = [
        row("a"),
        row("a", scorer="easyedit"),
        row("a", protocol="sequential"),
        row("a", protocol="sequential", evaluated_at="after_gap", gap=10),
        row("a", protocol="sequential", evaluated_at="after_gap", gap=20),
        row("a", protocol="sequential", evaluated_at="end", gap=3),
        row("b", protocol="sequential", evaluated_at="end", gap=2),
        row("a", model="llava"),
    ]
    legs = summary.summarize(rows)
    assert len(legs) == 7
    ends = [lines for leg, lines in legs.items() if leg.evaluated_at == "end"]
    assert [line.cases for lines in ends for line in lines] == [2]


def test_a_pooling_scorer_takes_kinds_together():
    rows = [
        row("a", "portability_reasoning", 1.0, scorer="ice"),
        row("a", "portability_aliasing", 0.0, scorer="ice", index=0),
        row("a", "portability_aliasing", 0.0, scorer="ice", index=1),
    ]
    _, (line,) = lines_of(rows)
    assert line.probes["portability"].score.mean == pytest.approx(1 / 3)
    _, (line,) = lines_of([msgspec.structs.replace(one, scorer="errata") for one in rows])
    assert line.probes["portability_aliasing"].score.mean == 0.0


def test_probes_stand_in_the_papers_order():
    names = [
        "zzz",
        "portability_2hop",
        "image_locality",
        "portability_1hop",
        "rephrase",
        "reliability",
        "text_locality_x",
    ]
    assert summary.sort_probes(names) == [
        "reliability",
        "rephrase",
        "text_locality_x",
        "image_locality",
        "portability_1hop",
        "portability_2hop",
        "zzz",
    ]


def test_summary_is_json_and_tells_what_it_is_of():
    plain = json.loads(json.dumps(summary.summary_json([row("a"), row("b", score=0.0)])))
    (leg,) = plain["legs"]
    assert (leg["model"], leg["scorer"]) == ("blip2-opt-2.7b", "errata")
    score = leg["editors"][0]["probes"]["reliability"]["score"]
    assert score == {"mean": 0.5, "low": 0.0, "high": 1.0, "count": 2}


# ------------------------------------------------------------------ tables
ROWS = [
    row("a"),
    row("b", score=0.5),
    row("a", "text_locality", 1.0),
    row("b", "text_locality", 1.0),
    row("a", editor="lora"),
    row("b", editor="lora"),
]


def test_markdown_table_has_the_papers_layout():
    text = tables.table([*ROWS, row("a", editor="a|b")], "markdown")
    assert "| Method | Rel | T-Loc |" in text
    assert "| Base | 0.00/0.00 | 100.00 |" in text
    assert "| finetune | 50.00/75.00 ± 25.0 | 100.00 ± 0.0 |" in text
    assert "a\\|b" in text


def test_latex_table_is_escaped():
    rows = [msgspec.structs.replace(one, editor="ft_{50%} & co") for one in ROWS[:4]]
    text = tables.table(rows, "latex")
    assert r"ft\_\{50\%\} \& co & 50.00/75.00 $\pm$ 25.0" in text
    assert text.count(r"\\") == 3
    assert re.search(r"(?<!\\)[_%&#]", re.sub(r" & ", "", text.split("midrule")[1])) is None


def test_a_table_needs_rows_and_a_known_style():
    with pytest.raises(InvalidInputError, match="at least one row"):
        tables.table([])
    with pytest.raises(InvalidInputError, match="one of terminal, markdown, latex; got 'html'"):
        tables.table(ROWS, "html")


# ------------------------------------------------------------------ lives of edits
def life(group, groups=1, gaps=()):
    """A sequential run in which an edit is lost once three others came after it."""
    for number in range(group * groups):
        at = number % group
        common = {"protocol": "sequential", "case_number": number}
        yield row(f"c{number}", score=1.0, **common)
        for gap in (*gaps, group - 1 - at):
            moment = "end" if gap == group - 1 - at else "after_gap"
            yield row(f"c{number}", score=float(gap < 3), evaluated_at=moment, gap=gap, **common)


def test_curves_by_age_and_by_position():
    found = {one["axis"]: one["points"] for one in curves.compute_curves(life(6, groups=2))}
    assert [(x, mean, count) for x, mean, _, _, count in found["age"]] == [
        (0, 1.0, 12),
        (1, 1.0, 2),
        (2, 1.0, 2),
        (3, 0.0, 2),
        (4, 0.0, 2),
        (5, 0.0, 2),
    ]
    assert [(x, count) for x, _, _, _, count in found["position"]] == [(n, 2) for n in range(1, 7)]


def test_long_lives_are_binned():
    found = {one["axis"]: one["points"] for one in curves.compute_curves(life(200))}
    assert len(found["age"]) == len(found["position"]) == 10
    assert sum(point[4] for point in found["position"]) == 200


def test_single_edits_have_no_life():
    assert curves.compute_curves([row("a"), row("b")]) == []


# ------------------------------------------------------------------ the page
def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def test_the_page_asks_nothing_of_a_network():
    page = report_html.render_page(list(life(4)))
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page)
    outside = re.findall(r"https?://[^\s\"')]+", page)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "@import" not in page
    assert "{{" not in page


def test_text_of_a_data_set_can_not_break_out_of_the_page():
    evil = "</script><script>alert(1)</script><!--"
    rows = [row(evil, prompt=evil, target="{{css}}", editor=evil, model=evil)]
    page = report_html.render_page(rows, title=evil + "{{data}}")
    assert "<script>alert" not in page
    assert "<title>&lt;/script&gt;" in page
    assert evil in data_of(page)["strings"]
    assert "{{css}}" in data_of(page)["strings"]
    script = report_html._read_asset("page.js")
    assert "innerHTML" not in script
    assert "eval(" not in script


def test_columns_say_what_the_rows_say():
    rows = [
        row(
            "a",
            score=0.25,
            scorer=scorer,
            images=("p1", "p2"),
            gap=2,
            evaluated_at="after_gap",
            protocol="sequential",
        )
        for scorer in ("errata", "easyedit")
    ] + [row("b", "text_locality", None)]
    data = data_of(report_html.render_page(rows))
    columns, strings = data["rows"], data["strings"]
    assert [len(column) for column in columns.values()] == [2] * len(columns)
    assert columns["scores"] == [[2500, 2500], [None, None]]
    assert [data["cases"][i] for i in columns["case"]] == ["a", "b"]
    assert [strings[i] for i in columns["target"]] == ["Rome", "Rome"]
    assert strings[columns["atext"][0]] == "Milan"
    assert columns["asaid"] == [-1, -1]
    assert columns["images"] == [[0, 1], []]
    assert [data["probes"][i]["key"] for i in columns["probe"]] == ["reliability", "text_locality"]


def test_pictures_are_embedded_once_bounded_and_only_from_their_folder(tmp_path, monkeypatch):
    home = tmp_path / "thumbnails"
    home.mkdir()
    Image.new("RGB", (40, 30), "red").save(home / "small.png")
    Image.effect_noise((900, 700), 90).save(home / "large.png")
    (home / "broken.png").write_bytes(b"no")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    names = ("small", "large", "broken", "gone", "../secret", "small")
    rows = [row("a", images=names), row("b", images=("small",))]
    data = data_of(report_html.render_page(rows, home))
    kinds = [uri and uri.split(";")[0] for uri in data["images"]]
    assert kinds == ["data:image/png", "data:image/jpeg", None, None, None]
    assert "3 images are not kept" in data["footer"]
    assert max(map(len, filter(None, data["images"]))) < 60_000
    monkeypatch.setattr(report_html, "MAX_IMAGE_CHARS", 1000)
    assert data_of(report_html.render_page(rows, home))["images"][1] is None


def test_what_is_too_much_is_left_out_by_whole_cases_and_said(monkeypatch):
    monkeypatch.setattr(report_html, "MAX_ROWS", 5)
    rows = [row(case, probe) for case in "abc" for probe in ("reliability", "rephrase")]
    data = data_of(report_html.render_page(rows))
    assert [data["cases"][i] for i in data["rows"]["case"]] == ["a", "a", "b", "b"]
    assert "1 cases are in the numbers but too many" in data["footer"]
    assert data["legs"][0]["editors"][0]["cases"] == 3


def test_ten_thousand_rows_are_a_small_page(tmp_path):
    rows = [
        row(
            f"case/{n:05d}",
            probe,
            float(n % 3 > 0),
            editor=editor,
            prompt=f"What is number {n}?",
            target=f"answer {n % 50}",
            case_number=n,
        )
        for n in range(500)
        for editor in ("ft", "lora", "grace", "mend")
        for probe in (
            "reliability",
            "rephrase",
            "image_rephrase",
            "text_locality",
            "image_locality",
        )
    ]
    assert len(rows) == 10_000
    page = report_html.render_page(rows)
    assert len(page) < 1_200_000
    assert len(data_of(page)["rows"]["case"]) == 10_000


def test_a_runs_folder_gives_benchmark_costs_and_published_numbers(tmp_path):
    records = tmp_path / "vqa_eval.json"
    records.write_text(json.dumps([{"src": "q", "alt": "a", "image": "val2014/x.jpg"}]))
    unit = UnitRecord(
        leg=LegKey(model="blip2-opt-2.7b", editor="finetune", protocol="single"),
        units=(UnitState(number=0),),
        cases=4,
        rows=1,
        end_byte=9,
        digest="",
        edit_seconds=2.0,
        probe_seconds=1.0,
        peak_bytes=10**9,
    )
    (tmp_path / PROGRESS).write_bytes(msgspec.json.encode(unit) + b"\n")
    settings = f'[cases]\nsource = "file"\npath = "{records}"\ntemplate = "easyedit"'
    report.write_page([row("a")], tmp_path / "report.html", folder=tmp_path, settings=settings)
    data = data_of((tmp_path / "report.html").read_text())
    assert data["facts"] == ["MMEdit E-VQA, vqa_eval.json"]
    (cost,) = data["costs"]
    assert (cost["seconds"], cost["peak"]) == (0.5, 10**9)
    mend = next(one for one in data["published"] if one["method"] == "MEND")
    assert (mend["scorer"], mend["values"]["reliability"]) == ("easyedit", 99.4)
    assert mend["exact_match"]["reliability"] == 98.51
    for other in (
        '\nmissing_images = "placeholder"',
        '\nmissing_images = "none"',
    ):  # not the same setting
        report.write_page([row("a")], tmp_path / "r.html", settings=settings + other)
        data = data_of((tmp_path / "r.html").read_text())
        assert data["published"] == []
        assert "missing images" in data["facts"][0]
    raw = settings.replace("easyedit", "raw")
    report.write_page([row("a")], tmp_path / "r.html", settings=raw)
    assert data_of((tmp_path / "r.html").read_text())["published"] == []


def test_a_page_whose_annotation_file_is_gone_is_still_written(tmp_path):
    settings = '[cases]\nsource = "file"\npath = "gone.json"'
    report.write_page([row("a")], tmp_path / "r.html", settings=settings)
    assert data_of((tmp_path / "r.html").read_text())["facts"] == ["gone.json"]


def test_the_command_line_prints_and_writes(tmp_path, capsys):
    from errata.bench.cli.main import main

    lines = b"".join(msgspec.json.encode(one) + b"\n" for one in ROWS)
    (tmp_path / RESULTS).write_bytes(lines)
    assert main(["report", str(tmp_path)]) == 0
    assert "finetune        75.0  100.0" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["legs"]
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(tmp_path / "nowhere")]) == 2


# ------------------------------------------------------------------ published numbers
def test_published_rows_are_whole_and_named():
    assert len(published_results()) == 136
    for one in published_results():
        assert one.source
        assert one.scorer in SCORERS
        assert set(one.values) <= set(PROBES) | {"portability_1hop"}
        assert all(0 <= value <= 100 for value in (*one.values.values(), *one.exact_match.values()))


@pytest.mark.parametrize("name", ["Salesforce/blip2-opt-2.7b", "blip2_opt_2.7b", "BLIP2-OPT-2.7B"])
def test_published_rows_are_found_however_the_model_is_spelled(name):
    assert {one.method for one in matching_results("mmedit-caption", "easyedit", name)} >= {
        "MEND",
        "SERAC",
    }
    assert matching_results("mmedit-caption", "easyedit", "tiny") == []
    assert matching_results("mmedit-caption", "raw", name) == []
    assert matching_results("", "", name) == []
