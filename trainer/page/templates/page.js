"use strict";
// Draws what trainer/page/run_data.py and study_data.py have found. Their texts are a stranger's: they become text nodes.

const COLOURS = ["#3b6fd4", "#e07b22", "#2a9d5c", "#c0398f", "#8a63d2", "#b59410", "#1f9bb3", "#d2453d", "#7a7f8a", "#6b8e23"];
const RAMP = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#9fda3a", "#e8c51d"];
const RAMP_DARK = ["#a078e0", "#8088e8", "#5f9fe0", "#40b5c8", "#3cc7a0", "#6cd67c", "#aee05a", "#f2dc4a"];
const EVERY_MS = 3000;
const LINES_OF_LOSS = {"loss": {width: 1, opacity: 0.55}, "val_loss": {dash: "dot"}, "val_loss_ema": {points: true}};

const byId = (id) => document.getElementById(id);
const kept = new Map(); // what a person has chosen: lines that are off, axes, members, the slider
let page = null;
let received = Date.now();
let pressed = false;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") element.style.cssText = value;
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// ------------------------------------------------------------------------------------------------------- numbers
function figure(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** Of steps, images and whatever else is counted. */
const whole = (count) => count.toLocaleString("en");

function span(seconds) {
  if (seconds === null || !isFinite(seconds)) return "–";
  const s = Math.round(seconds);
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
  return `${(s / 86400).toFixed(1)} d`;
}

function imagesAt(run, step) {
  const points = run.images;
  if (!points.length) return step;
  let after = points.findIndex((point) => point[0] >= step);
  if (after === -1) after = points.length - 1;
  if (after === 0) return points[0][1];
  const [a, seenA] = points[after - 1], [b, seenB] = points[after];
  return seenA + ((seenB - seenA) * (step - a)) / (b - a || 1);
}

const across = (run, steps) => (byId("axis").value === "step" ? steps : steps.map((step) => imagesAt(run, step)));

function smoothed(values, weight) {
  let mean = 0, share = 0;
  return values.map((value) => {
    if (value === null) { mean = share = 0; return null; }
    mean = weight * mean + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return mean / share;
  });
}

// --------------------------------------------------------------------------------------------------------- runs
const runs = () => page.sources.filter((each) => each.kind === "run");
const seen = () => runs().filter((run) => !kept.get(`off ${run.folder}`));
const colour = (source) => COLOURS[source.number % COLOURS.length];
const isDark = () => document.documentElement.dataset.theme === "dark";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function tile(value, name, title) { return make("div", {class: "tile", title}, make("b", {}, value), make("span", {}, name)); }

function card(run) {
  const config = run.config, newest = run.newest, several = page.sources.length > 1;
  const facts = [config["model.kind"], config["model.width"] && `width ${config["model.width"]}`,
    config["model.depth"] && `depth ${config["model.depth"]}`, config["data.resolution"] && `${config["data.resolution"]} px`,
    config["train.global_batch_size"] && `batch ${config["train.global_batch_size"]}`, config["optim.lr"] && `lr ${config["optim.lr"]}`,
    config["mup.parametrization"], config["parallel.engine"], config["parallel.precision"]].filter((fact) => fact && fact !== "None");
  const left = run.state === "running" && run.steps ? (run.steps - run.step) * newest["step_time_s"] : null;
  const done = run.steps ? Math.min(1, run.step / run.steps) : 0;
  const speed = "mfu" in newest ? tile(`${figure(100 * newest["mfu"], 3)} %`, "MFU")
    : tile(figure(newest["model_tflops_per_s"], 3), "model TFLOP/s");
  return make("article", {class: "card"},
    make("header", {}, several && make("span", {class: "swatch", style: `background:${colour(run)}`}), make("h3", {}, run.name),
      make("span", {class: `badge ${run.state || ""}`}, run.state || "not started")),
    make("div", {class: "facts"}, facts.join(" · ")),
    run.problem && make("p", {class: "note warn"}, run.problem),
    !run.problem && [
      make("div", {class: "progress"}, make("div", {style: `width:${(100 * done).toFixed(2)}%`})),
      make("div", {class: "facts"}, `step ${whole(run.step)}${run.steps ? ` of ${whole(run.steps)}` : ""}`
        + (run.images.length ? `, ${whole(Math.round(imagesAt(run, run.step)))} images` : "")
        + (run.stages.length ? `, ${run.stages[run.stages.length - 1].name}` : "")),
      make("div", {class: "tiles"}, tile(figure(newest["loss"]), "training loss"), tile(figure(newest["val_loss_ema"]), "validation, EMA"),
        tile(figure(newest["images_per_s"], 3), "images/s"), speed,
        run.state === "running" && tile(span(left), "left"), make("div", {class: "tile"},
          make("b", {class: "age", "data-age": run.age_s}, ""), make("span", {}, "since the last line"))),
    ],
    run.reason && make("p", {class: `note ${run.state === "failed" ? "bad" : ""}`}, run.reason),
    run.notes.map((note) => make("p", {class: "note warn"}, note)));
}

function drawAges() {
  const passed = page.live ? (Date.now() - received) / 1000 : 0;
  for (const each of document.querySelectorAll(".age")) {
    each.textContent = each.dataset.age === undefined ? "–" : span(Number(each.dataset.age) + passed);
  }
}

function drawChips() {
  const several = runs().length > 1;
  byId("chips").replaceChildren(...(several ? runs() : []).map((run) => make("button", {type: "button",
    class: `chip ${kept.get(`off ${run.folder}`) ? "off" : ""}`, title: "show or hide",
    onclick: () => { kept.set(`off ${run.folder}`, !kept.get(`off ${run.folder}`)); draw(); }},
    make("span", {class: "swatch", style: `background:${colour(run)}`}), run.name)));
}

function differences() {
  const shown = seen();
  if (shown.length < 2) return null;
  const keys = [...new Set(shown.flatMap((run) => Object.keys(run.config)))]
    .filter((key) => !key.startsWith("run.") && new Set(shown.map((run) => run.config[key])).size > 1);
  if (!keys.length) return null;
  return [make("h2", {}, "What differs"), make("div", {class: "card scroll short"}, make("table", {},
    make("tr", {}, make("th", {}, "key"), shown.map((run) => make("th", {}, run.name))),
    keys.map((key) => make("tr", {}, make("td", {}, key), shown.map((run) => make("td", {}, run.config[key] ?? "–"))))))];
}

// ------------------------------------------------------------------------------------------------------- panels
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;"); // plotly reads a little HTML

function axis(title, extra) {
  return {title: {text: title, standoff: 8, font: {size: 12}}, gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false,
    tickfont: {size: 11}, automargin: true, exponentformat: "power", ...extra};
}

/** What a person has zoomed to stays when data come, and goes where an axis means something else. */
function layout(x, y, shapes) {
  return {margin: {l: 58, r: 12, t: 8, b: 40}, showlegend: false, hovermode: "closest", uirevision: `${byId("axis").value} ${y.type}`, shapes: shapes || [],
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: css("--soft"), family: "system-ui, sans-serif"},
    hoverlabel: {font: {size: 12}, namelength: 40}, xaxis: x, yaxis: y};
}

function plot(place, traces, form) {
  Plotly.react(place, traces, form, {displaylogo: false, responsive: true, displayModeBar: false});
}

/** Vertical lines where a stage begins, or where the run went back. */
function marks(shown) {
  if (shown.length !== 1) return [];
  const [run] = shown;
  const steps = [...run.stages.slice(1).map((stage) => [stage.step, css("--soft")]),
    ...run.events.filter((event) => event.kind === "rollback").map((event) => [event.step, css("--bad")])];
  return steps.map(([step, color]) => {
    const [x] = across(run, [step]);
    return {type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: {color, width: 1, dash: "dash"}};
  });
}

function bands(panel, shown) {
  return shown.filter((run) => panel.band && run.band.length).flatMap((run) => {
    const color = shown.length > 1 ? colour(run) : "#808a9a", x = across(run, run.band.map((each) => each[0]));
    const edge = {mode: "lines", line: {width: 0, color}, hoverinfo: "skip", x};
    return [{...edge, y: run.band.map((each) => each[2])},
      {...edge, y: run.band.map((each) => each[3]), fill: "tonexty", fillcolor: color + "33"},
      {x, y: run.band.map((each) => each[1]), mode: run.band.length > 1 ? "lines" : "markers", line: {color, width: 1.2, dash: "dot"},
        name: "forecast", hovertemplate: "forecast %{y:.4g}<extra></extra>"}];
  });
}

function traces(panel, lines, shown, off) {
  const weight = panel.smooth ? Number(byId("smooth").value) : 0, several = shown.length > 1;
  const found = bands(panel, shown);
  lines.forEach((line, number) => shown.forEach((run) => {
    const curve = run.curves[line.key];
    if (!curve || off.has(line.key)) return;
    const style = (panel.band && LINES_OF_LOSS[line.key]) || {};
    const color = several ? colour(run) : lineColour(panel, number);
    const x = across(run, curve.x), raw = curve.y.map((value) => (value === null ? null : value * panel.factor));
    const soft = weight > 0 && raw.length > 30, name = escaped(several ? `${run.name}, ${line.label}` : line.label);
    const mode = style.points || raw.length <= (several ? 15 : 30) ? "lines+markers" : "lines";
    const base = {x, mode, name, marker: {size: 4.5}, hovertemplate: `%{y:.4g} at %{x:,}<extra>${name}</extra>`};
    if (soft) found.push({...base, y: raw, mode: "lines", line: {color, width: 1}, opacity: 0.22, hoverinfo: "skip", hovertemplate: null});
    found.push({...base, y: soft ? smoothed(raw, weight) : raw, opacity: several ? style.opacity || 1 : 1,
      line: {color, width: several ? style.width || 1.6 : 1.6, dash: style.dash || "solid"}});
  }));
  return found;
}

function lineColour(panel, number) {
  if (!panel.ordered) return COLOURS[number % COLOURS.length];
  const ramp = isDark() ? RAMP_DARK : RAMP;
  return ramp[Math.round((number * (ramp.length - 1)) / Math.max(1, panel.lines.length - 1))];
}

function drawPanel(panel, place) {
  const id = `${panel.section} ${panel.title}`, shown = seen();
  const lines = panel.lines.filter((line) => shown.some((run) => run.curves[line.key]));
  const one = shown.length > 1 && lines.length > 1 && !panel.band; // of several runs one line of each
  const chosen = lines.find((line) => line.key === kept.get(`line ${id}`)) || lines[lines.length >> 1];
  const drawn = one ? [chosen] : lines, off = kept.get(`lines ${id}`) || new Set();
  const values = drawn.flatMap((line) => shown.flatMap((run) => run.curves[line.key]?.y || []));
  // Zeros are left out, as of an update before the warm-up; what may be negative has no logarithm.
  const mayBeLog = panel.log && values.some((value) => value > 0) && values.every((value) => value === null || value >= 0);
  const isLog = mayBeLog && !kept.get(`linear ${id}`), again = () => drawPanel(panel, place);
  const [header, legend, graph] = place.children;
  header.replaceChildren(make("h3", {}, panel.title, make("span", {class: "unit"}, panel.unit)),
    one ? make("select", {"aria-label": "line", onchange: (event) => { kept.set(`line ${id}`, event.target.value); again(); }},
      lines.map((line) => make("option", {value: line.key, selected: line === chosen}, line.label))) : "",
    mayBeLog ? make("button", {type: "button", title: "the vertical axis", onclick: () => { kept.set(`linear ${id}`, isLog); again(); }},
      isLog ? "log" : "linear") : "");
  const turn = (key) => { off.has(key) ? off.delete(key) : off.add(key); kept.set(`lines ${id}`, off); again(); };
  legend.replaceChildren(panel.ordered && drawn.length > 1 ? "t =" : "", ...(drawn.length > 1 ? drawn : []).map((line, number) => make("button", {type: "button",
    class: off.has(line.key) ? "off" : "", onclick: () => turn(line.key)}, make("i", {style:
      `border-color:${shown.length > 1 ? css("--soft") : lineColour(panel, panel.ordered ? panel.lines.indexOf(line) : number)};` +
      (panel.band && LINES_OF_LOSS[line.key]?.dash ? "border-top-style:dotted" : "")}), line.label.replace("t = ", ""))),
    panel.band && shown.some((run) => run.band.length) ? make("span", {}, "▒ forecast, 90 %") : "");
  place.hidden = !lines.length;
  const x = axis(byId("axis").value === "step" ? "step" : "images seen", {exponentformat: "SI"});
  if (lines.length) plot(graph, traces(panel, drawn, shown, off), layout(x, axis("", logAxis(isLog, values, panel)), marks(shown)));
}

/** Ticks that can be read: plotly's own leave out the leading digits between powers of ten. */
function logAxis(isLog, values, panel) {
  if (!isLog && values.every((value) => !value)) return {type: "linear", range: [0, 1]};
  if (!isLog) return {type: "linear", rangemode: panel.factor === 100 ? "tozero" : "normal"};
  const positive = values.filter((value) => value > 0).map((value) => value * panel.factor);
  const decades = Math.log10(Math.max(...positive) / Math.min(...positive));
  if (decades > 3) return {type: "log", dtick: Math.ceil(decades / 6)};
  const steps = decades > 1.5 ? [1, 3] : decades > 0.8 ? [1, 2, 5] : decades > 0.4 ? [1, 1.5, 2, 3, 4, 5, 7] : null;
  if (!steps) return {type: "log"};
  const ticks = [];
  for (let power = Math.floor(Math.log10(Math.min(...positive))) - 1; power <= Math.log10(Math.max(...positive)) + 1; power++) {
    ticks.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(3))));
  }
  return {type: "log", tickmode: "array", tickvals: ticks, ticktext: ticks.map((tick) => (tick < 1e-3 ? tick.toExponential() : figure(tick)))};
}

function newPanel(panel) {
  return make("figure", {class: "panel"}, make("header", {}), make("div", {class: "legend"}), make("div", {class: "plot"}),
    make("p", {class: "note"}, panel.note));
}

const panelPlaces = new Map();
function panelGrid(section) {
  const places = page.panels.filter((panel) => panel.section === section).map((panel) => {
    const id = `${panel.section} ${panel.title}`;
    if (!panelPlaces.has(id)) panelPlaces.set(id, newPanel(panel));
    return panelPlaces.get(id);
  });
  return places.length ? make("div", {class: "grid"}, places) : null;
}

// ------------------------------------------------------------------------------------------------------ samples
function address(run, [step, version]) {
  return run.pictures ? run.pictures[step] : `samples/${run.number}/${step}?v=${version}`;
}

function samples() {
  const shown = seen().filter((run) => run.samples.length);
  if (!shown.length) return null;
  const steps = [...new Set(shown.flatMap((run) => run.samples.map((each) => each[0])))].sort((a, b) => a - b);
  const at = steps.includes(kept.get("sample")) ? steps.indexOf(kept.get("sample")) : steps.length - 1;
  const pictures = make("div", {class: "pictures"}), told = make("output", {id: "sample-step"});
  const slider = make("input", {type: "range", id: "sample", min: 0, max: steps.length - 1, value: at, "aria-label": "step of the samples"});
  const show = () => {
    const step = steps[slider.value];
    told.textContent = `step ${whole(step)}`;
    pictures.replaceChildren(...shown.map((run) => {
      const each = run.samples.filter((sample) => sample[0] <= step).pop() || run.samples[0];
      const image = make("img", {src: address(run, each), alt: `samples of ${run.name} at step ${each[0]}`});
      image.addEventListener("load", () => {
        const small = image.naturalWidth < 400;
        image.classList.toggle("small", small);
        image.style.width = `${small ? image.naturalWidth * Math.max(1, Math.round(480 / image.naturalWidth)) : image.naturalWidth}px`;
      });
      return make("figure", {}, image, make("figcaption", {}, shown.length > 1 ? `${run.name}, step ${whole(each[0])}` : `step ${whole(each[0])}`));
    }));
  };
  slider.addEventListener("input", () => {
    // At the right end it follows the run.
    Number(slider.value) === steps.length - 1 ? kept.delete("sample") : kept.set("sample", steps[slider.value]);
    show();
  });
  show();
  const prompts = shown[0].prompts;
  const list = make("ol", {class: "prompts"}, prompts.map((text) => make("li", {}, text)));
  return [make("h2", {}, "Samples"), make("div", {class: "card", id: "samples"}, make("div", {class: "slide"}, slider, told),
    make("div", {class: "beside"}, pictures, shown.length === 1 && prompts.length ? make("div", {}, make("h3", {}, "Prompts, row by row"), list) : ""),
    shown.length > 1 && prompts.length ? make("details", {open: kept.get("prompts"), ontoggle: (event) => kept.set("prompts", event.target.open)},
      make("summary", {}, `${prompts.length} prompts, row by row`), list) : "")];
}

// ----------------------------------------------------------------------------------- ranks, holes, events, config
function slowRanks() {
  const rows = seen().flatMap((run) => Object.entries(run.slowest).flatMap(([name, ranks]) =>
    ranks.map(([rank, count]) => [run, name.replace("perf/", "").replace("_", " "), rank, count])));
  if (!rows.length) return null;
  return make("figure", {class: "panel"}, make("header", {}, make("h3", {}, "Slow ranks",
    make("span", {class: "unit"}, "log lines"))),
    make("div", {class: "scroll"}, make("table", {}, rows.map(([run, name, rank, count]) => make("tr", {},
      seen().length > 1 ? make("td", {}, run.name) : "", make("td", {}, name), make("td", {}, `rank ${rank}`), make("td", {class: "n"}, whole(count)),
      make("td", {}, make("div", {class: "meter"}, make("div", {style: `width:${Math.min(100, (100 * count) / run.lines).toFixed(1)}%`}))))))),
    make("p", {class: "note"}, "In which this rank was the slowest, and a tenth above the median."));
}

function holes() {
  const tables = seen().map((run) => {
    const last = run.holes[run.holes.length - 1];
    if (!last) return null;
    const reasons = Object.entries(last.holes), most = Math.max(1, ...reasons.map((each) => each[1]));
    return make("figure", {class: "panel"}, make("header", {}, make("h3", {}, "Holes by reason",
      make("span", {class: "unit"}, `${runs().length > 1 ? `${run.name}, ` : ""}checkpoint of step ${whole(last.step)}`))),
      reasons.length ? make("table", {}, make("tr", {}, make("th", {}, "reason"), make("th", {class: "n"}, "samples"), make("th", {class: "n"}, "of those read"), make("th", {})),
        reasons.map(([reason, count]) => make("tr", {}, make("td", {}, reason), make("td", {class: "n"}, whole(count)),
          make("td", {class: "n"}, `${figure((100 * count) / Math.max(1, last.read), 3)} %`),
          make("td", {}, make("div", {class: "meter"}, make("div", {style: `width:${(100 * count) / most}%`}))))))
        : make("p", {class: "facts"}, `All ${whole(last.read)} samples could be read.`));
  });
  return tables.some(Boolean) ? tables : null;
}

function events() {
  const rows = seen().flatMap((run) => run.events.map((event) => [run, event])).sort((a, b) => b[1].step - a[1].step);
  if (!rows.length) return null;
  return [make("h2", {}, "Events"), make("div", {class: "card scroll", id: "events"}, make("table", {},
    make("tr", {}, make("th", {class: "n", style: "width:1%"}, "step"), seen().length > 1 ? make("th", {}, "run") : "", make("th", {style: "width:9em"}, "what"), make("th", {}, "")),
    rows.map(([run, event]) => make("tr", {}, make("td", {class: "n"}, whole(event.step)), seen().length > 1 ? make("td", {}, run.name) : "",
      make("td", {class: {failed: "failed", rollback: "failed", preempted: "preempted", finished: "finished"}[event.kind] || ""}, event.kind),
      make("td", {}, event.text)))))];
}

function folded(name, id, children) {
  return make("details", {open: kept.get(id), ontoggle: (event) => {
    if (event.target.open === Boolean(kept.get(id))) return;
    kept.set(id, event.target.open);
    drawPanels();
  }}, make("summary", {}, name), children);
}

function configs() {
  const shown = seen().filter((run) => Object.keys(run.config).length);
  return shown.map((run) => folded(shown.length > 1 ? `Config of ${run.name}` : "Config", `config ${run.folder}`,
    make("div", {class: "card scroll"}, make("table", {}, Object.entries(run.config).map(([key, value]) =>
      make("tr", {}, make("th", {}, key), make("td", {}, value)))))));
}

// ------------------------------------------------------------------------------------------------------ studies
const STATES = {complete: "#3b6fd4", halved: "#9aa3b2", diverged: "#d2453d", running: "#2a9d5c"};

function study(source) {
  const trials = source.trials, best = trials.find((trial) => trial.value !== null);
  const graph = (title, unit) => { const place = newPanel({note: ""}); place.children[0].append(make("h3", {}, title, make("span", {class: "unit"}, unit))); return place; };
  const values = trials.filter((trial) => trial.value !== null).flatMap((trial) => [trial.value, ...trial.curve.y]).filter((value) => value > 0);
  const losses = (given) => {
    const low = Math.log10(Math.min(...given)), high = Math.log10(Math.max(...given)), room = 0.05 * (high - low) + 0.002;
    return axis("", given.length ? {...logAxis(true, given, {factor: 1}), range: [low - room, high + room]} : {});
  };
  const curves = graph("Learning curves", "validation loss of the EMA weights"), later = [];
  later.push(() => plot(curves.children[2], trials.filter((trial) => trial.curve.x.length).map((trial) => ({x: trial.curve.x, y: trial.curve.y,
    mode: "lines", name: `trial ${trial.number}`, line: {width: trial === best ? 2.5 : 1, color: trial === best ? "#e07b22" : STATES[trial.state]},
    opacity: trial === best ? 1 : 0.6, hovertemplate: `%{y:.4g} at %{x}<extra>trial ${trial.number}</extra>`})),
    layout(axis("step"), losses(values))));
  const scatters = source.keys.map((key) => {
    const place = graph(key.key, "loss of each trial"), done = trials.filter((trial) => trial.value !== null);
    later.push(() => plot(place.children[2], [{x: done.map((trial) => trial.point[key.key]), y: done.map((trial) => trial.value), mode: "markers",
      text: done.map((trial) => `trial ${trial.number}`), hovertemplate: "%{y:.4g} at %{x}<extra>%{text}</extra>",
      marker: {size: 8, color: done.map((trial) => (trial === best ? "#e07b22" : STATES[trial.state]))}}],
      layout(axis(escaped(key.key), key.log ? logAxis(true, done.map((trial) => trial.point[key.key]), {factor: 1})
        : {type: key.numeric ? "linear" : "category"}), losses(done.map((trial) => trial.value).filter((value) => value > 0)))));
    return place;
  });
  const report = source.report ? make("iframe", {sandbox: true, srcdoc: source.report, title: `report of ${source.name}`})
    : source.has_report && page.live ? make("a", {href: `study/${source.number}`, target: "_blank"}, "the report of the study") : "";
  const counts = Object.entries(source.counts).map(([state, count]) => `${count} ${state}`).join(", ");
  return [later, make("section", {}, make("h2", {}, `Study: ${source.name}`),
    make("div", {class: "card"}, source.problem ? make("p", {class: "note warn"}, source.problem) : make("p", {class: "facts"},
      `${source.config}: ${whole(source.steps)} steps per trial; ${counts}`),
      best && make("p", {}, make("b", {}, `Best: trial ${best.number}, ${figure(best.value)}`), ` ${Object.entries(best.point).map(([key, value]) => `${key}=${figureOrText(value)}`).join("  ")}`),
      source.notes.map((note) => make("p", {class: "note warn"}, note)), source.report ? "" : report),
    trials.length ? make("div", {class: "grid", style: "margin-top:12px"}, curves, scatters) : "",
    trials.length ? make("div", {class: "card scroll", style: "margin-top:12px"}, make("table", {}, make("tr", {}, make("th", {class: "n"}, "trial"), make("th", {}, "state"),
      make("th", {class: "n"}, "val_loss_ema"), source.keys.map((key) => make("th", {class: "n"}, key.key)), make("th", {})),
      trials.map((trial) => make("tr", {}, make("td", {class: "n"}, String(trial.number)), make("td", {}, trial.state), make("td", {class: "n"}, figure(trial.value)),
        source.keys.map((key) => make("td", {class: "n"}, figureOrText(trial.point[key.key]))), make("td", {class: "note"}, trial.reason))))) : "",
    source.report ? [make("h2", {}, "Its report"), report] : "")];
}

const figureOrText = (value) => (typeof value === "number" ? figure(value) : value ?? "–");

// --------------------------------------------------------------------------------------------------------- page
function drawPanels() {
  for (const panel of page.panels) {
    const place = panelPlaces.get(`${panel.section} ${panel.title}`);
    if (place && place.isConnected && (place.offsetParent !== null || place.hidden)) drawPanel(panel, place);
  }
}

function draw() {
  document.title = `${page.sources.map((source) => source.name).join(", ")} · muDiT`;
  drawChips();
  byId("runs").replaceChildren(...page.notes.map((note) => make("p", {class: "note warn"}, note)), make("div", {class: "cards"}, runs().map(card)), ...(differences() || []));
  const studies = page.sources.filter((source) => source.kind === "study").map(study);
  const headed = (section, ...more) => { const found = [panelGrid(section), ...more.flat()].filter(Boolean); return found.length ? [make("h2", {}, section), ...found] : null; };
  const speed = panelGrid("Speed"), slow = slowRanks(), missing = holes(), data = panelGrid("Data") || (missing && make("div", {class: "grid"}));
  if (speed && slow) speed.append(slow);
  if (data && missing) data.append(...missing.filter(Boolean));
  const parts = [studies.map((each) => each[1]), headed("Loss"), samples(), headed("Optimisation"), speed && [make("h2", {}, "Speed"), speed],
    headed("μP health by role"), data && [make("h2", {}, "Data"), data], events(), page.panels.some((panel) => panel.section === "More")
      ? folded("More figures", "more", panelGrid("More")) : null, configs()];
  const top = window.scrollY;
  byId("body").replaceChildren(...parts.flat(2).filter(Boolean));
  window.scrollTo(0, top);
  drawPanels();
  studies.forEach(([later]) => later.forEach((each) => each()));
  drawAges();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  if (page) draw();
}

async function follow() {
  const pulse = byId("pulse");
  if (pressed) { // what is dragged is not drawn anew
    setTimeout(follow, EVERY_MS / 10);
    return;
  }
  let trouble = "";
  try {
    const answer = await fetch(`data?stamp=${page ? page.stamp : ""}`);
    if (!answer.ok) trouble = await answer.text();
    else if (answer.status !== 204) {
      page = {...(await answer.json()), live: true};
      received = Date.now();
      draw();
    }
  } catch (error) {
    trouble = "no answer from mudit watch";
  }
  pulse.textContent = trouble || "live";
  pulse.classList.toggle("lost", Boolean(trouble));
  if (page) drawAges();
  setTimeout(follow, EVERY_MS);
}

document.addEventListener("pointerdown", () => { pressed = true; });
for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { pressed = false; });
byId("axis").addEventListener("change", () => page && draw());
byId("smooth").addEventListener("input", () => page && drawPanels());
byId("theme").addEventListener("click", () => theme(isDark() ? "light" : "dark"));
theme(new URLSearchParams(location.search).get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
const held = JSON.parse(byId("data").textContent);
if (held) {
  page = held;
  byId("pulse").textContent = `as of ${page.made}`;
  draw();
} else follow();
