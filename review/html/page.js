"use strict";
// The page of a review. Everything from a run reaches the document as text (textContent), never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const state = { x: "steps", smooth: "loss_1", measure: "tokens_per_s", sort: null, down: false, text: "", hidden: new Set() };
  const xs = { steps: "optimizer steps", tokens: "tokens trained on", seconds: "seconds of training" };
  const measures = { tokens_per_s: "tokens per second, all workers", grad_norm: "gradient norm before clipping", lr: "learning rate" };

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key === "style") Object.assign(node.style, value);
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }
  // Plotly reads some tags in its texts: to it, a run's text goes with none.
  const plain = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  const short = (text, most = 40) => (text.length > most ? text.slice(0, most - 1) + "\u2026" : text);
  const shown = () => data.runs.filter((run) => !state.hidden.has(run.id));
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Named one by one: the default bar also has a button that sends the chart to a server.
  const buttons = ["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"];

  function figure(id, traces, layout) {
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
    const merged = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 13 },
      margin: { l: 60, r: 20, t: 24, b: 48 }, hovermode: "closest",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--dim"), activecolor: css("--accent") }, ...layout,
    };
    for (const key of Object.keys(merged).filter((k) => /^[xy]axis/.test(k))) merged[key] = { ...axis, ...merged[key] };
    Plotly.react(by(id), traces, merged, { responsive: true, displaylogo: false, modeBarButtons: [buttons] });
  }
  const hoverlabel = { namelength: -1 };
  const legend = () => (data.few ? { orientation: "h", y: -0.2, yanchor: "top" } : undefined);
  // Many runs have no legend, but a scale: an empty trace that carries it. A scale runs from the best to the worst.
  const scale = () => (data.few || !data.range ? [] : [{
    x: [null], y: [null], mode: "markers", showlegend: false, hoverinfo: "skip",
    marker: { color: data.range, cmin: Math.min(...data.range), cmax: Math.max(...data.range), reversescale: !data.goals[0].least,
      colorscale: data.scale.map((c, i) => [i / (data.scale.length - 1), c]), showscale: true,
      colorbar: { title: { text: plain(data.goals[0].title), side: "right" }, thickness: 14 } },
  }]);
  const rank = (run) => (run.state === "done" && typeof run[data.goals[0].key] === "number"
    ? run[data.goals[0].key] * (data.goals[0].least ? 1 : -1) : Infinity);
  // Of many, the best are drawn last, so that they lie on top.
  const drawn = () => {
    const runs = shown().filter((run) => run.curve);
    return data.few ? runs : runs.sort((a, b) => (rank(a) === rank(b) ? 0 : rank(b) - rank(a)));
  };

  function loss() {
    const traces = [];
    for (const run of drawn()) {
      const name = plain(short(run.name)), x = run.curve[state.x];
      const line = { color: run.colour, dash: run.dash, width: data.few ? 1.5 : 1.2 };
      const common = { legendgroup: run.id, hoverlabel, name, meta: run.id };
      traces.push({ ...common, x, y: run.curve[state.smooth], mode: "lines", line, showlegend: data.few });
      if (run.held.steps.length) {
        traces.push({ ...common, x: run.held[state.x], y: run.held.val_loss, mode: "markers", name: name + ", held out",
          marker: { color: run.colour, size: data.few ? 8 : 5, line: { color: css("--ink"), width: data.few ? 1 : 0 } }, showlegend: false });
      }
    }
    const yaxis = { title: { text: "loss (nats per token)" }, type: by("log").checked ? "log" : "linear" };
    if (!by("whole").checked && data.focus) yaxis.range = by("log").checked ? data.focus.map(Math.log10) : data.focus;
    figure("loss", traces.concat(scale()), { xaxis: { title: { text: xs[state.x] } }, yaxis, legend: legend() });
  }

  function speed() {
    const traces = drawn().map((run) => ({
      x: run.curve[state.x], y: run.curve[state.measure], mode: "lines", name: plain(short(run.name)), hoverlabel, meta: run.id,
      line: { color: run.colour, dash: run.dash, width: 1.3 }, showlegend: data.few,
    }));
    figure("speed", traces.concat(scale()), { xaxis: { title: { text: xs[state.x] } }, legend: legend(),
      yaxis: { title: { text: measures[state.measure] }, rangemode: "tozero" } });
  }

  function ranks() {
    const runs = shown().filter((run) => run.ranks);
    const seconds = (v) => v.toPrecision(3);
    const traces = runs.flatMap(({ id, name, colour, dash, ranks: r }) => {
      const common = { x: r.step, mode: "lines", name: plain(short(name)), hoverlabel, meta: id, legendgroup: id };
      return [
        { ...common, y: r.median_s, line: { color: colour, dash, width: 0.8 }, hoverinfo: "skip", showlegend: false },
        { ...common, y: r.slowest_s, line: { color: colour, dash, width: 1.8 }, showlegend: data.few, hoverinfo: "text",
          text: r.step.map((step, i) => plain(`${short(name)}, step ${step}: rank ${r.slowest_rank[i]} ${seconds(r.slowest_s[i])} s, `
            + `median ${seconds(r.median_s[i])} s, fastest ${seconds(r.fastest_s[i])} s`)) },
      ];
    });
    figure("ranks", traces.concat(scale()), { xaxis: { title: { text: xs.steps } }, legend: legend(),
      yaxis: { title: { text: "seconds of work a step" }, rangemode: "tozero" } });
    by("ranks-text").replaceChildren(...runs.map((run) => el("p", {}, `${run.name}: ${run.ranks.text}`)));
  }

  function parallel() {
    if (!data.parallel) return;
    const visible = new Set(shown().map((run) => run.id));
    const traces = data.parallel.lines.filter((line) => visible.has(line.id)).map((line) => ({
      x: line.at.map((_, i) => i), y: line.at, mode: "lines", meta: line.id, hoverlabel, hoverinfo: "text",
      text: line.at.map((_, i) => plain(`${short(line.name)} (${line.state}): ${data.parallel.axes[i].key} = ${line.values[i]}`)),
      line: { color: line.colour || css("--dim"), width: line.colour ? 2 : 1 }, opacity: line.colour ? 0.85 : 0.5, showlegend: false,
    }));
    const axes = data.parallel.axes;
    const ticks = axes.flatMap((axis, i) => axis.ticks.map(([y, text]) => ({
      x: i, y, text: plain(text), xanchor: "left", xshift: 4, showarrow: false, font: { size: 11 }, bgcolor: css("--bg"), borderpad: 1,
    })));
    figure("parallel", traces.concat(scale()), {
      annotations: ticks,
      shapes: axes.map((_, i) => ({ type: "line", x0: i, x1: i, y0: 0, y1: 1, line: { color: css("--dim"), width: 1 } })),
      xaxis: { tickvals: axes.map((_, i) => i), ticktext: axes.map((axis) => plain(short(axis.key, 28))), range: [-0.1, axes.length - 0.4],
        showgrid: false, zeroline: false, side: "top" },
      yaxis: { visible: false, range: [-0.05, 1.05] }, margin: { l: 20, r: 40, t: 60, b: 12 },
    });
  }

  function search() {
    if (!data.search) return;
    const visible = new Set(shown().map((run) => run.id)), dots = data.search.dots.filter((dot) => visible.has(dot.id));
    const symbols = { o: "circle", v: "triangle-down-open", x: "x", s: "square-open" };
    const traces = [...new Set(dots.map((dot) => dot.kind))].map((kind) => {
      const mine = dots.filter((dot) => dot.kind === kind);
      return { x: mine.map((d) => d.number), y: mine.map((d) => d.shown), mode: "markers", name: kind, hoverlabel, hoverinfo: "text",
        text: mine.map((d) => plain([`${short(d.name)}: ${d.kind}`, d.score === null ? "" : d.score.toPrecision(5), short(d.why, 120)].filter(Boolean).join(", "))),
        marker: { symbol: symbols[mine[0].marker], color: mine.map((d) => d.colour), size: 10, line: { width: 1.5, color: mine.map((d) => d.colour) } } };
    });
    traces.unshift({ x: data.search.best.map((b) => b[0]), y: data.search.best.map((b) => b[1]), mode: "lines", name: "best so far", hoverinfo: "skip",
      line: { shape: "hv", color: css("--dim"), width: 1.3 } });
    figure("search", traces, { legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, margin: { l: 60, r: 20, t: 40, b: 48 },
      xaxis: { title: { text: "trial" }, tickformat: "d" }, yaxis: { title: { text: plain(data.goals[0].title) }, range: data.search.range } });
  }

  function importance() {
    by("importance").hidden = !data.importance;
    if (!data.importance) return;
    const keys = data.importance.keys.slice(0, 15).reverse();
    by("importance").style.height = 110 + 34 * keys.length + "px";
    figure("importance", [{
      type: "bar", orientation: "h", y: keys.map((k) => plain(k.key)), x: keys.map((k) => k.mean), marker: { color: "#4477AA" },
      error_x: { type: "data", symmetric: false, array: keys.map((k) => Math.max(k.high - k.mean, 0)),
        arrayminus: keys.map((k) => Math.max(k.mean - k.low, 0)), color: css("--ink") }, hoverinfo: "x+y",
    }], { xaxis: { title: { text: plain(`error of prediction when the key is shuffled (${data.goals[0].unit})`) } }, yaxis: { type: "category" } });
  }

  function goodput() {
    const rows = shown().filter((run) => Object.keys(run.shares).length);
    const causes = [...new Set(rows.flatMap((run) => Object.keys(run.shares)))];
    const cycle = ["#228833", "#CCBB44", "#4477AA", "#EE6677", "#AA3377", "#66CCEE", "#BBBBBB"];
    by("goodput").style.height = Math.max(160, 110 + 24 * rows.length) + "px";
    figure("goodput", causes.map((cause, i) => ({
      type: "bar", orientation: "h", name: plain(cause), marker: { color: cycle[i % cycle.length] }, hoverinfo: "text",
      y: rows.map((run) => run.id), x: rows.map((run) => 100 * (run.shares[cause] || 0)), textposition: "none",
      text: rows.map((run) => plain(`${run.name}: ${cause} ${(100 * (run.shares[cause] || 0)).toFixed(1)} %, ${run.starts} starts`)),
    })), { barmode: "stack", bargap: 0.25, legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" }, margin: { l: 60, r: 20, t: 40, b: 48 },
      xaxis: { title: { text: "% of the wall time of all starts" }, range: [0, 100] },
      yaxis: { type: "category", autorange: "reversed", tickvals: rows.map((run) => run.id), ticktext: rows.map((run) => plain(short(run.name, 28))) } });
  }

  function scaling() {
    const study = data.scaling;
    if (!study) return;
    const traces = study.sizes.flatMap((size, i) => {
      const line = { color: size.colour, width: 1.5 };
      const name = size.n.toLocaleString("en") + " parameters";
      return [
        { x: size.curve.x, y: size.curve.y, mode: "lines", line, name, legendgroup: i, showlegend: false, hoverinfo: "skip" },
        { x: size.x, y: size.y, text: size.names.map(plain), mode: "markers", name, legendgroup: i, marker: { color: size.colour, size: 9 } },
      ];
    });
    traces.push({ ...study.frontier, mode: "lines", name: "frontier", line: { color: css("--ink"), dash: "dash", width: 1.5 }, hoverinfo: "skip" });
    traces.push({ x: study.guesses.map((g) => g.x), y: study.guesses.map((g) => g.loss), text: study.guesses.map((g) => plain(g.name)), mode: "markers",
      name: "foretold (not fitted), middle 80 %", marker: { symbol: "diamond-open", size: 11, color: css("--ink") },
      error_y: { type: "data", symmetric: false, array: study.guesses.map((g) => Math.max(g.high - g.loss, 0)),
        arrayminus: study.guesses.map((g) => Math.max(g.loss - g.low, 0)), color: css("--ink") } });
    const known = study.guesses.filter((g) => g.measured !== null);
    traces.push({ x: known.map((g) => g.x), y: known.map((g) => g.measured), text: known.map((g) => plain(g.name)), mode: "markers", name: "measured",
      marker: { symbol: "star", size: 12, color: "#AA3377" } });
    figure("scaling", traces, { legend: { orientation: "h", y: -0.2, yanchor: "top" },
      xaxis: { type: "log", title: { text: "compute (FLOPs)" } }, yaxis: { title: { text: "held-out loss (nats per token)" } } });
    by("law").replaceChildren(...study.report.map((line) => el("p", {}, line)));
  }

  const keyed = data.keys.map((key) => ({ key, config: true }));
  const facts = [...new Set([...data.goals.map((goal) => goal.key), "val_loss", "bits_per_byte", "step", "tokens", "params", "wall_s", "goodput", "tokens_per_s", "mfu", "mfu_measured", "gpu_peak_gib", "starts"])];
  const front = 1 + (data.keys.length > 8 ? facts.length : data.goals.length); // few keys stand beside what they led to
  const columns = [{ key: "name", text: true }, { key: "state", text: true },
    ...facts.slice(0, front - 1).map((key) => ({ key })), ...keyed, ...facts.slice(front - 1).map((key) => ({ key })),
    { key: "notes", text: true },
  ].filter((c) => c.config || c.text || data.runs.some((run) => run[c.key] !== null));
  const value = (run, column) => (column.config ? run.config[column.key] : run[column.key]);
  const show = (v) => (v === null || v === undefined ? "" : typeof v === "number" && !Number.isInteger(v) ? String(+v.toPrecision(5)) : String(v));

  function compare(a, b) {
    const [none, nor] = [a, b].map((v) => v === null || v === undefined || v === "");
    if (a === b || (none && nor)) return 0;
    if (none || nor) return none ? 2 : -2; // what is not there comes last, either way
    if (typeof a === "number" && typeof b === "number") return a < b ? -1 : 1;
    return String(a).localeCompare(String(b), "en", { numeric: true }) < 0 ? -1 : 1;
  }

  function matches(run) {
    const all = [run.name, run.state, ...data.keys.map((key) => `${key}=${run.config[key]}`)].join(" ").toLowerCase();
    return state.text.toLowerCase().split(/\s+/).every((word) => all.includes(word));
  }

  function table() {
    const column = columns.find((c) => c.key === state.sort);
    const rows = data.runs.filter(matches).sort((a, b) => {
      if (!column) return rank(a) === rank(b) ? 0 : rank(a) - rank(b); // the finished ones, best first, then the others
      const order = compare(value(a, column), value(b, column));
      return Math.abs(order) === 2 ? order : state.down ? -order : order;
    });
    const head = el("tr", {}, ...columns.map((c) => el("th", {
      class: c.text ? "text" : "", "aria-sort": c === column ? (state.down ? "descending" : "ascending") : "none", "data-key": c.key,
    }, el("button", { onclick: () => { state.down = state.sort === c.key && !state.down; state.sort = c.key; table(); } }, c.key))));
    const body = rows.map((run) => el("tr", { "data-run": run.id }, ...columns.map((c) => {
      const text = show(value(run, c)), measured = data.goals.some((goal) => goal.key === c.key) && !c.config;
      const kind = !measured ? "" : run.best ? " best" : run.state === "done" ? "" : " unfinished";
      const cell = el("td", { class: (c.text ? "text" : "") + kind, title: c.key === "state" ? run.notes || text : text });
      if (c.key === "name") {
        const box = el("input", { type: "checkbox", "aria-label": "show " + run.name, onchange: () => {
          state.hidden[box.checked ? "delete" : "add"](run.id); draw();
        } });
        box.checked = !state.hidden.has(run.id);
        cell.append(box, " ", el("span", { class: "swatch", style: { borderColor: run.colour, borderTopStyle: { dash: "dashed", dot: "dotted" }[run.dash] || "solid" } }));
      }
      if (c.key === "name" && run.best) cell.append(text, el("span", { class: "state best" }, "best"));
      else cell.append(c.key === "state" ? el("span", { class: "state " + run.state }, text) : text);
      return cell;
    })));
    by("table").replaceChildren(el("thead", {}, head), el("tbody", {}, ...body));
    by("count").textContent = rows.length === data.runs.length ? `${rows.length} runs` : `${rows.length} of ${data.runs.length} runs`;
  }

  function samples() {
    const run = data.runs.find((r) => r.id === by("sample-run").value);
    if (!run) return;
    const steps = [...new Set(run.samples.map((s) => s.step))];
    const slider = by("sample-step");
    slider.max = steps.length - 1;
    const step = steps[Math.min(slider.value, steps.length - 1)];
    by("sample-at").textContent = `step ${step} (${steps.indexOf(step) + 1} of ${steps.length})`;
    by("sample-text").replaceChildren(...run.samples.filter((s) => s.step === step).map((s) => el("pre", {}, el("span", { class: "prompt" }, s.prompt), s.text)));
  }

  function lineage() {
    const rows = [...new Set(data.runs.flatMap((run) => Object.keys(run.environment)))];
    by("lineage").replaceChildren(
      el("thead", {}, el("tr", {}, el("th", { class: "text" }, "run"), ...rows.map((key) => el("th", { class: "text" }, key)))),
      el("tbody", {}, ...data.runs.map((run) => el("tr", {}, el("td", { class: "text" }, run.name),
        ...rows.map((key) => el("td", { class: "text", title: show(run.environment[key]) }, show(run.environment[key])))))));
  }

  function failures() {
    const bad = shown().filter((run) => run.notes && run.state !== "pruned");
    by("failures").replaceChildren(...bad.map((run) => el("p", {}, el("span", { class: "state " + run.state }, run.state), ` ${run.name}: ${run.notes}`)));
  }

  function draw() { loss(); speed(); ranks(); goodput(); failures(); search(); parallel(); importance(); scaling(); }

  function choose(id, options, current, then) {
    for (const [key, text] of Object.entries(options)) by(id).append(el("option", { value: key }, text));
    by(id).value = current;
    by(id).addEventListener("change", () => then(by(id).value));
  }
  choose("x", xs, state.x, (v) => { state.x = v; loss(); speed(); });
  choose("smooth", { loss: "none", loss_1: "mean of 1 %", loss_5: "mean of 5 %" }, state.smooth, (v) => { state.smooth = v; loss(); });
  choose("measure", measures, state.measure, (v) => { state.measure = v; speed(); });
  for (const id of ["log", "whole"]) by(id).addEventListener("change", loss);
  by("filter").addEventListener("input", () => {
    state.text = by("filter").value;
    state.hidden = new Set(data.runs.filter((run) => !matches(run)).map((run) => run.id));
    table(); draw();
  });
  by("theme").addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const sampled = data.runs.filter((run) => run.samples.length);
  for (const [id, there] of [["search", data.search], ["parallel", data.parallel], ["importance", data.importance || data.search], ["scaling", data.scaling], ["ranks", data.runs.some((run) => run.ranks)], ["samples", sampled.length]]) {
    by(id + "-part").hidden = !there;
  }
  choose("sample-run", Object.fromEntries(sampled.map((run) => [run.id, run.name])), sampled.length ? (sampled.find((run) => run.best) || sampled[0]).id : "", samples);
  by("sample-step").addEventListener("input", samples);
  by("sample-step").value = 1e6;
  table(); lineage(); samples(); draw();
  document.documentElement.dataset.ready = "yes";
})();
