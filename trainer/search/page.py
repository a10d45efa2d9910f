"""The report of a search as one page that needs no other file."""

import base64
from collections import Counter
from pathlib import Path

import jinja2

from .report import Report
from .space import as_overrides

SHOWN_TRIALS = 10
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ r.study.search.name }}: search</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222 }
 h1 { margin-bottom: 0 } h2 { margin-top: 1.6em } img { max-width: 100% } table { border-collapse: collapse }
 td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
 .found { background: #fdf6e3; padding: .6em 1em; border-left: 4px solid #e4a11b }
 .note { color: #666; font-size: 14px }
 pre { overflow-x: auto; font-size: 13px }
</style>
<h1>{{ r.study.search.name }}</h1>
<p class="note">Proxy {{ r.study.search.config }}: width {{ c.model.width }} at base width {{ c.mup.base_width }}, depth
{{ c.model.depth }}, {{ c.train.steps }} steps of {{ c.train.global_batch_size }}. {{ r.study.search.sampler }} sampler,
{{ r.study.search.seeds }} seed{{ "s" if r.study.search.seeds > 1 }} a point.
{% for state, count in counts.items() %}{{ count }} {{ state }}{{ ", " if not loop.last }}{% endfor %}.</p>

<p class="found" id="best"><b>Best: trial {{ r.best.number }}</b>, val_loss_ema {{ "%.4g"|format(r.best.value) }}<br>
{% for text in best %}<code>{{ text }}</code> {% endfor %}</p>

<h2>Loss against each hyperparameter</h2>
<img id="losses" src="{{ png(r.pictures.losses) }}" alt="loss of every trial against each key">
<table><tr><th>key</th><th>best trial</th><th>best region, 95 %</th><th>importance</th>
<th>all diverged from</th></tr>
{% for k in r.keys %}<tr><td><code>{{ k.dimension.key }}</code></td><td>{{ number(k.best) }}</td>
<td>{% if k.region %}{{ number(k.region.value) }} ({{ number(k.region.low) }} to {{ number(k.region.high) }}){% else %}
{{ 'too few trials' if k.dimension.numeric else 'no order' }}{% endif %}</td>
<td>{{ "%.0f %%"|format(100 * k.importance) if k.importance is not none else "" }}</td>
<td>{% if k.edge %}{{ number(k.edge[1]) }}{% if k.octaves_to_edge %}, {{ "%.1f"|format(k.octaves_to_edge) }} octaves
above the best{% endif %}{% else %}none{% endif %}</td></tr>{% endfor %}</table>
<p class="note">Loss: of the EMA weights on the fixed bank of images, times and noise, without auxiliary losses; the
same data, noise and initial weights in all trials. Best region: minimum of a separable parabola through the better half
of the trials, with the interval that resampling them gives. A trial diverged if a figure was not finite, or its loss
above 1.5 x the median after a quarter of its steps.</p>
{% if 'importance' in r.pictures %}<img id="importance" src="{{ png(r.pictures.importance) }}" alt="importance">
{% endif %}

<h2>Learning curves</h2>
<img id="curves" src="{{ png(r.pictures.curves) }}" alt="validation loss against step">

<h2>Cost</h2>
<table id="cost">
<tr><td>FLOPs of all trials</td><td>{{ "%.3g"|format(r.spent.flops) }}</td></tr>
<tr><td>{{ "GPU" if r.spent.device not in ("cpu", "not started") else "Process" }}-hours on {{ r.spent.device }}</td>
<td>{{ "%.3g"|format(r.spent.process_hours) }}</td></tr>
{% if r.planned %}<tr><td>share of one run of {{ r.study.search.target }}</td>
<td>{{ "%.2f %%"|format(100 * r.spent.share) }}</td></tr>{% endif %}</table>
{% if r.planned %}<pre>{{ r.planned.describe() }}</pre>{% endif %}

<h2>Trials</h2>
<table><tr><th>trial</th><th>state</th><th>val_loss_ema</th>
{% for k in r.keys %}<th>{{ k.dimension.key }}</th>{% endfor %}
<th></th></tr>
{% for t in shown %}<tr><td>{{ t.number }}</td><td>{{ t.state }}</td>
<td>{% if t.value is not none %}{{ "%.4g"|format(t.value) }}{% if t.losses|length > 1 %}
<span class="note">({% for v in t.losses %}{{ "%.4g"|format(v) }}{{ " " if not loop.last }}{% endfor %})</span>
{% endif %}{% endif %}</td>{% for k in r.keys %}<td>{{ number(t.point[k.dimension.key]) }}</td>{% endfor %}
<td class="note">{{ t.reason }}</td></tr>{% endfor %}</table>
{% if hidden %}<p class="note">and {{ hidden }} more: optuna-dashboard {{ r.study.folder }}/study.journal</p>{% endif %}

<h2>Next</h2>
<pre>python launch/search.py transfer --study {{ r.study.folder }} --to {{ r.study.search.target or "TARGET.yaml" }} \
--output found.yaml</pre>
</html>
"""


def write_page(report: Report) -> Path:
    """report/index.html in the study's folder."""
    ranked = sorted(report.trials, key=lambda t: (t.value is None, t.value or 0.0, t.state == "waiting", t.number))
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    text = page.render(
        r=report,
        c=report.study.proxy,
        counts=Counter(trial.state for trial in report.trials),
        best=as_overrides(report.best.point),
        shown=ranked[:SHOWN_TRIALS],
        hidden=len(ranked) - len(ranked[:SHOWN_TRIALS]),
        png=_inline,
        number=lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
    )
    path = report.study.folder / "report" / "index.html"
    path.write_text(text)
    return path


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
