"""Facts -> report.html: one file that needs no other, light or dark as the reader's system is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from nanochat import chat_format as chat
from nanochat.report import page
from nanochat.report.charts import Bars, Line, bar_chart, line_chart
from nanochat.report.facts import TRAINED, Facts, StageFacts
from nanochat.report.page import Table
from nanochat.report.plots import COLOURS, smooth
from nanochat.run_dir import clock

MARKS = {
    chat.PYTHON_END + chat.OUTPUT_START: " = ", chat.PYTHON_START: "[", chat.PYTHON_END: "] ",
    chat.OUTPUT_START: "[", chat.OUTPUT_END: "] ",
}  # fmt: skip
GREY, OTHER = "#8a8f98", "#937ac2"
GREYS = ("#c9cdd4", "#aab0b9", "#8a909b", "#6b727d")
STYLE = """
:root{color-scheme:light dark;--ink:#1c1f24;--soft:#5d6570;--line:#dfe3e8;--paper:#fff;--card:#f6f7f9;
  --accent:#3867b8;--under:var(--paper)}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa3ae;--line:#343a42;--paper:#15181c;
  --card:#1e2227;--accent:#82aaf0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:2rem 1.2rem 4rem;background:var(--paper);color:var(--ink);
  font:15px/1.5 system-ui,sans-serif}
h1{margin:0;font-size:1.7rem}
h2{margin:2.4rem 0 .8rem;font-size:1.2rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
h3{margin:1.2rem 0 .4rem;font-size:1rem}
.sub,figcaption,.note{color:var(--soft)}
a{color:var(--accent)}
nav a{display:inline-block;margin-right:1rem;text-decoration:none;white-space:nowrap}
nav a:hover{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.8rem;margin:1.4rem 0}
.card{background:var(--card);border-radius:10px;padding:.8rem 1rem}
.card b{display:block;font-size:1.45rem;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto;background:linear-gradient(90deg,var(--under) 40%,transparent) 0/2rem 100% local,
  linear-gradient(270deg,var(--under) 40%,transparent) 100%/2rem 100% local,
  linear-gradient(90deg,var(--line),transparent) 0/.7rem 100%,
  linear-gradient(270deg,var(--line),transparent) 100%/.7rem 100%;background-repeat:no-repeat}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child,.t{text-align:left}
th{color:var(--soft);font-weight:600}
tr:hover td{background:var(--card)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:1rem}
.pairs{width:auto;min-width:min(100%,28rem)}
.pairs td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.pairs td:first-child{color:var(--soft);white-space:nowrap}
figure{--under:var(--card);margin:0;background:var(--card);border-radius:10px;padding:.8rem;min-width:0}
.charts+.scroll{margin-top:.8rem}
figure.wide{grid-column:1/-1}
figcaption{font-weight:600}
svg{width:100%;height:auto;display:block;overflow:visible}
svg text{fill:var(--soft);font-size:11px}
svg .small{font-size:10px}
.grid{stroke:var(--line)}
.line{fill:none;stroke-width:1.8}
.whisker{stroke:var(--ink);stroke-width:1.4}
.mark{stroke:var(--ink);stroke-dasharray:2 3}
.keys{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem;color:var(--soft)}
.keys i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
pre{background:var(--card);border-radius:8px;padding:.7rem 1rem;white-space:pre-wrap;
  overflow-wrap:anywhere;font-size:13px;margin:.5rem 0}
.talk{border-left:3px solid var(--line);padding:.1rem 0 .1rem .9rem;margin:.7rem 0}
.talk.right{border-color:#3d9a5f}
.talk.wrong{border-color:#c8553d}
.talk p{margin:.15rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
.talk p:first-child{color:var(--soft)}
.talk.text p:first-child b{font-weight:400;color:var(--ink)}
@media(prefers-color-scheme:dark){svg .line,svg rect,svg circle,.keys i{filter:brightness(1.12)}}
@media(max-width:560px){body{padding:1.2rem .8rem 3rem}
  th,td{padding:.3rem .35rem;font-size:.85rem}
  th:first-child,td:first-child{white-space:normal;padding-left:0}
  .pairs td:first-child{white-space:normal}
  svg text{font-size:14px}svg .small{font-size:13px}figure{padding:.6rem}
  .cards{grid-template-columns:repeat(2,1fr)}}
@media print{nav,.keys i{print-color-adjust:exact}figure,.talk{break-inside:avoid}}
summary{cursor:pointer;color:var(--accent);margin:.4rem 0}
"""


def html(facts: Facts, tag: str, price: float | None = None, all_answers: str | None = None) -> str:
    """The whole report of one run as HTML.

    price: dollars per device and hour; all_answers: a page to link to.
    """
    sections = [
        ("Summary", table(page.summary(facts)) + '<p class="note">–: not measured. Intervals are below.</p>'),
        ("Learning", group([*curves(facts)])),
        ("Reinforcement", group(reward_curves(facts))),
        ("Chat tasks", group([accuracies(facts)]) + fold("all figures", table(page.chat_tasks(facts)))),
        ("CORE", group([core_bars(facts)]) + fold("all figures", table(page.core_tasks(facts)))
         + note(core_note(facts))),
        ("Tokenizer", group([tokenizer_bars(facts)]) + table(_tokenizer(facts))),
        ("Answers", _link(all_answers) + answers(facts)),
        ("Samples of the base model", samples(facts)),
        ("Time" if price is None else "Time and cost", table(page.stages(facts, price))
         + note("Training stages: without start, evaluation and saving."
                + ("" if price is None else f" At ${price:g} per device and hour."))),
        ("Plan", table(page._pairs(facts["base"].get("plan") or {}))),
        ("Environment", "".join(map(table, _machines(facts)))),
        ("Settings", "".join(fold(n, _settings(stage)) for n, stage in facts.items() if stage.settings)),
    ]  # fmt: skip
    return document(
        f"The run {tag}", subtitle(facts), cards(facts, price), [(t, b) for t, b in sections if b]
    )


def document(title: str, sub: str, top: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page from its parts, which are HTML already (the title is text)."""
    name = lambda t: t.lower().replace(" ", "-")  # noqa: E731
    links = "".join(f'<a href="#{name(t)}">{escape(t)}</a>' for t, _ in sections)
    body = "".join(f'<h2 id="{name(t)}">{escape(t)}</h2>{content}' for t, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="sub">{sub}</p>{top}<nav>{links}</nav>{body}</body></html>\n'
    )


def table(rows: Table) -> str:
    if not rows:
        return ""
    is_text = [not any(c.isdigit() for row in rows[1:] for c in row[k]) for k in range(len(rows[0]))]
    marks = [" class=t" if k and text else "" for k, text in enumerate(is_text)]
    cell = lambda kind, row: "".join(  # noqa: E731
        f"<{kind}{mark}>{escape(c)}</{kind}>" for mark, c in zip(marks, row, strict=True)
    )
    body = "".join(f"<tr>{cell('td', row)}</tr>" for row in rows[1:])
    head = f"<thead><tr>{cell('th', rows[0])}</tr></thead>" if any(rows[0]) else ""
    kind = "" if head else " class=pairs"
    return f'<div class="scroll"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def fold(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def group(figures: Sequence[str]) -> str:
    kept = "".join(filter(None, figures))
    return f'<div class="charts">{kept}</div>' if kept else ""


def note(text: Any) -> str:
    return f'<p class="note">{escape(str(text))}</p>' if text else ""


def subtitle(facts: Facts) -> str:
    dates = sorted({d for s in facts.values() if (d := s.get("finished"))})
    machine: dict[str, Any] = next((m for s in facts.values() if (m := s.get("machine"))), {})
    gpus = machine.get("gpus") or []
    where = f"{len(gpus)} x {gpus[0]}" if gpus else machine.get("cpu")
    missing = [f"{name} ({s.status})" for name, s in facts.items() if s.status != "finished"]
    parts = [" to ".join(sorted({dates[0], dates[-1]})) if dates else "", str(where or "")]
    parts.append(f"not finished: {', '.join(missing)}" if missing else "")
    return escape(" · ".join(filter(None, parts)))


def cards(facts: Facts, price: float | None = None) -> str:
    measured = [facts[f"chat_eval_{s}"] for s in TRAINED if f"chat_eval_{s}" in facts]
    chat = [s.get("chatcore") for s in measured if s.get("chatcore") is not None]
    seconds = [s.seconds for s in facts.values() if s.seconds is not None]
    tokens = [n for s in TRAINED if s in facts and (n := facts[s].get("tokens"))]
    base, base_eval = facts["base"], facts["base_eval"]
    values = [
        ("ChatCORE", page.number(chat[-1]) if chat else None),
        ("CORE", page.number(base_eval.get("core")) if base_eval.get("core") is not None else None),
        ("bits per byte", page.number(b) if (b := base_eval.get("val_bpb") or base.get("val_bpb")) else None),
        ("time", clock(sum(seconds)) if seconds else None),
        ("tokens learned from", page.count(sum(tokens)) if tokens else None),
        ("parameters", page.count(p) if (p := (base.get("plan") or {}).get("params_total")) else None),
        ("cost", page.dollars(page.cost(facts, sum(seconds), price)) if price is not None else None),
    ]
    made = "".join(
        f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in values if v
    )
    return f'<div class="cards">{made}</div>' if made else ""


def curves(facts: Facts) -> list[str]:
    """Loss of every stage, bits per byte, learning rates, tokens per second."""
    found = []
    for name in (s for s in TRAINED if s in facts and s not in ("rl",)):
        steps, values = facts[name].series("loss")
        checks, held = facts[name].series("val_loss")
        found.append(line_chart(f"{name}: loss", [
            Line("", steps, values, COLOURS[name], faint=True),
            Line("training", steps, smooth(values), COLOURS[name]),
            Line("validation", checks, held, GREY, dashed=True, dots=True),
        ], "step", "nats per token"))  # fmt: skip
    bits = Line("validation", *facts["base"].series("val_bpb"), COLOURS["base"], dots=True)
    found.append(line_chart("base: bits per byte", [bits], "step", "bits per byte"))
    for key, title, unit in (
        ("lr_factor", "learning rate", "factor"),
        ("tokens_per_second", "tokens per second", "smoothed"),
        ("peak_frac", "use of the hardware", "share of its peak, smoothed"),
    ):
        shares = {name: share(facts[name], key) for name in TRAINED if name in facts}
        lines = [
            Line(name, xs, ys if key == "lr_factor" else smooth(ys), COLOURS[name])
            for name, (xs, ys) in shares.items()
        ]
        found.append(line_chart(title, lines, "share of the stage", unit, True))
    return found


def share(stage: StageFacts, key: str) -> tuple[list[float], list[float]]:
    """A metric over the share of the stage's steps, so that stages of any length lie side by side."""
    steps, values = stage.series(key)
    last = max(steps, default=1)
    return [step / last for step in steps], values


def reward_curves(facts: Facts) -> list[str]:
    if "rl" not in facts:
        return []
    rl, colour = facts["rl"], COLOURS["rl"]
    steps, rewards = rl.series("reward")
    names = sorted({k for row in rl.metrics for k in row if k.startswith("accuracy_")})
    colours = [COLOURS["base"], COLOURS["sft"], OTHER, COLOURS["mid"]]
    held = [
        Line(name.removeprefix("accuracy_"), *rl.series(name), colours[i % 4], dots=True)
        for i, name in enumerate(names)
    ]
    plain = (
        ("kl", "distance from the parent (KL)", "nats"),
        ("answer_tokens", "length of answers", "tokens"),
        ("same_frac", "groups of equal rewards", "share"),
        ("clip_frac", "clipped tokens", "share"),
    )
    return [
        line_chart("reward of sampled answers", [Line("", steps, rewards, colour, faint=True),
                   Line("smoothed", steps, smooth(rewards), colour)], "step", "mean reward", True),
        line_chart("held-out accuracy, greedy", held, "step", "share", True),
        *(line_chart(title, [Line("", *rl.series(key), colour)], "step", unit, True)
          for key, title, unit in plain if any(rl.series(key)[1])),
    ]  # fmt: skip


def accuracies(facts: Facts) -> str:
    found = {s: facts[f"chat_eval_{s}"].get("tasks") or {} for s in TRAINED if f"chat_eval_{s}" in facts}
    for stage, tasks in found.items():
        mean = facts[f"chat_eval_{stage}"].get("chatcore")
        if mean is not None and len(tasks) > 1:
            found[stage] = tasks | {"ChatCORE": {"accuracy": mean, "low": mean, "high": mean, "chance": 0}}
    names = list(dict.fromkeys(name for tasks in found.values() for name in tasks if name != "ChatCORE"))
    names += ["ChatCORE"] if any("ChatCORE" in tasks for tasks in found.values()) else []
    series = [
        Bars(
            stage, [100 * tasks[n]["accuracy"] if n in tasks else None for n in names], COLOURS[stage],
            [(100 * tasks[n]["low"], 100 * tasks[n]["high"]) if n in tasks else None for n in names],
        )
        for stage, tasks in found.items()
    ]  # fmt: skip
    chance = [next(100 * t[n]["chance"] for t in found.values() if n in t) for n in names]
    title = "accuracy with 95 % intervals; dotted: chance"
    return bar_chart(title, names, series, "per cent", chance, 105, wide=True)


def core_bars(facts: Facts) -> str:
    """Centred accuracy of each task, beside the reference models that the bundle brings."""
    tasks = facts["base_eval"].get("core_tasks") or {}
    names = list(tasks)
    series = [Bars("this model", [tasks[n]["centred"] for n in names], COLOURS["base"])]
    for (model, values), colour in zip(known_models(facts).items(), GREYS, strict=False):
        series.append(Bars(model, [values.get(n) for n in names], colour))
    return bar_chart("centred accuracy (0 is chance, 1 is perfect)", names, series, "centred", wide=True)


def known_models(facts: Facts) -> dict[str, dict[str, float]]:
    """Centred accuracies of the models in the bundle, the weakest on the measured tasks first."""
    found = facts["base_eval"].get("core_references") or {}
    tasks = facts["base_eval"].get("core_tasks") or {}
    return dict(sorted(found.items(), key=lambda item: sum(item[1].get(name, 0) for name in tasks)))


def core_note(facts: Facts) -> str:
    """What was measured, and the means of the bundle's models over the same tasks."""
    said = facts["base_eval"].get("core_note") or ""
    if facts["base_eval"].get("core") is None:
        return f"Not measured: {said}." if said else ""
    tasks, parts = facts["base_eval"].get("core_tasks") or {}, [said] if said else []
    means = [
        f"{model} {page.number(sum(values[name] for name in tasks) / len(tasks))}"
        for model, values in known_models(facts).items()
        if tasks.keys() <= values.keys()
    ]
    parts += [f"over the same tasks: {', '.join(means)}"] if means else []
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def tokenizer_bars(facts: Facts) -> str:
    ratios = (facts.get("tok_eval") or facts["base"]).get("bytes_per_token")
    if not isinstance(ratios, dict):
        return ""
    names = list(next((v for v in ratios.values() if v), {}))
    colours = (COLOURS["base"], GREY, OTHER, COLOURS["mid"])
    series = [
        Bars(who, [found.get(n) for n in names], colour)
        for (who, found), colour in zip(ratios.items(), colours, strict=False)
        if found
    ]
    return bar_chart("bytes per token (more is better)", names, series, "bytes", wide=True)


def _tokenizer(facts: Facts) -> Table:
    both = {k: v for name in ("tok_train", "tok_eval") for k, v in (facts[name].result or {}).items()}
    return page._pairs({k: v for k, v in both.items() if k not in ("machine", "tokenizer")})


def answers(facts: Facts) -> str:
    found = [facts[f"chat_eval_{stage}"] for stage in reversed(TRAINED) if f"chat_eval_{stage}" in facts]
    newest = next((stage for stage in found if stage.get("examples")), None)
    if newest is None:
        return ""
    parts = [note(f"The first of each task, {newest.name}.")]
    for task, records in newest.get("examples").items():
        parts.append(f"<h3>{escape(task)}</h3>")
        for r in records:
            kind = "right" if r["right"] else "wrong"
            said = without_marks(r.get("full") or r["answer"])
            parts.append(
                f'<div class="talk {kind}"><p>{escape(r["question"])}</p><p>{escape(said)}</p></div>'
            )
    return "".join(parts)


def without_marks(text: str) -> str:
    """Calls of the tool as people read them.

    >>> without_marks("<|python_start|>1 + 2<|python_end|><|output_start|>3<|output_end|>It is 3.")
    '[1 + 2 = 3] It is 3.'
    """
    for mark, shown in MARKS.items():
        text = text.replace(mark, shown)
    return text


def _link(address: str | None) -> str:
    if address is None:
        return ""
    return f'<p><a href="{escape(address)}">All answers of all stages</a>, wrong ones first, by task.</p>'


def samples(facts: Facts) -> str:
    found = facts["base_eval"].get("samples") or []
    return "".join(
        f'<div class="talk text"><p>{escape(p)}<b>{escape(text)}</b></p></div>' for p, text in found
    )


def _machines(facts: Facts) -> list[Table]:
    found = {json.dumps(s.get("machine")): s.get("machine") for s in facts.values() if s.get("machine")}
    return [page._pairs(machine) for machine in found.values()]


def _settings(stage: StageFacts) -> str:
    rows = {k: v for k, v in (stage.settings or {}).items() if k != "home"}
    return table([["", ""], *([k, page.DASH if v is None else str(v)] for k, v in rows.items())])
