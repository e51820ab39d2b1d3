// Track pages: charts whose axis, metric and machine are chosen, and the tables of the chosen machine. Data comes from
// data/ladders-<track>.js; all text of it goes in as text, never as HTML.
(function () {
  "use strict";

  const data = window.stepmarkLadders;
  if (!data || !window.vegaEmbed) return; // the drawings and tables of the page stand on their own

  const { figure, element, choice, cell, number } = window.stepmark;

  // Rows of a task as objects, the quality of every metric below `q`.
  function unpack(task) {
    const { rows } = task;
    return rows.method.map((method, i) => {
      const row = { i };
      for (const name of Object.keys(rows)) if (!name.startsWith("metric:")) row[name] = rows[name][i];
      row.name = task.methods[method];
      row.q = {};
      for (const metric of Object.keys(task.metrics)) {
        const value = rows["metric:" + metric + ":value"][i];
        const [low, high] = ["low", "high"].map((end) => rows["metric:" + metric + ":" + end][i]);
        if (value !== null) row.q[metric] = { value, low, high };
      }
      return row;
    });
  }

  // Rows that no other beats on both cost and quality, cheapest first: `front` of fronts.py.
  function front(rows, axis, metric, higher) {
    const sign = higher ? 1 : -1;
    const able = rows.filter((row) => row.status === "ok");
    const beats = (a, b) =>
      a[axis] <= b[axis] && sign * a.q[metric].value >= sign * b.q[metric].value &&
      (a[axis] < b[axis] || a.q[metric].value !== b.q[metric].value);
    return able.filter((row) => !able.some((other) => beats(other, row))).sort((a, b) => a[axis] - b[axis]);
  }

  const UNITS = { unit: "", nfe_equivalent: "NFE-eq", latency_ms: "ms/item", memory_mib: "MiB", joules: "J/item", offline_s: "s" };
  const SWEPT = ["unit", "nfe_equivalent", "latency_ms"]; // axes along which a ladder climbs: intervals make a band

  function spec(task, drawn, state) {
    const { axis, metric, chosen } = state;
    const anchor = task.methods[task.anchors[state.place]];
    const higher = task.metrics[metric] === "higher";
    const best = front(drawn, axis, metric, higher);
    const ahead = new Set([anchor, ...best.map((row) => row.name)]);
    const alone = new Map();
    for (const row of drawn) alone.set(row.name, (alone.get(row.name) ?? 0) + 1);
    const values = drawn.map((row) => {
      const q = row.q[metric];
      const state = row.status === "ok" ? "" : ", " + row.status;
      return {
        method: row.name, cost: row[axis], rung: row.rung, value: q.value, low: q.low, high: q.high,
        flagged: row.status !== "ok",
        lead: chosen.size > 0 ? chosen.has(row.name) : ahead.has(row.name), // the others are faint until asked for
        strength: best.includes(row) || chosen.has(row.name) ? 1 : 0.45,
        barred: !SWEPT.includes(axis) || alone.get(row.name) < 2,
        href: "../methods/" + row.name + ".html",
        quality: figure(q.value) + " [" + figure(q.low) + ", " + figure(q.high) + "]",
        at: "rung " + row.rung + ", " + figure(row[axis]) + " " + (UNITS[axis] || task.unit) + state,
        label: row.name + ", rung " + row.rung + ": " + metric + " " + figure(q.value) + " at " + figure(row[axis]) + state,
      };
    });
    const least = Math.min(...values.map((d) => d.value));
    const logarithmic = least > 0 && Math.max(...values.map((d) => d.value)) > 8 * least;
    if (logarithmic) for (const d of values) d.low = Math.max(d.low, least / 2); // a longer interval ends at the edge
    const present = task.methods.filter((name) => alone.has(name));
    const look = (list) => present.map((name) => list[task.methods.indexOf(name) % list.length]);
    const x = {
      field: "cost", type: "quantitative", title: data.axes[axis].replace("{unit}", task.unit),
      scale: { type: "log", nice: false, padding: 14 },
      axis: { tickCount: 6, format: "~g", labelOverlap: "greedy", grid: false },
    };
    const y = {
      field: "value", type: "quantitative", title: metric + " (" + task.metrics[metric] + " is better)",
      scale: logarithmic ? { type: "log", nice: false, padding: 6 } : { zero: false, nice: true },
      axis: { tickCount: 6, format: "~g", labelOverlap: "greedy" },
    };
    // In colour: what leads or was chosen, and what is pointed at.
    const asked = { or: [{ param: "pointed", empty: false }, "datum.lead"] };
    const colours = { field: "method", type: "nominal", legend: null, scale: { domain: present, range: look(data.colours) } };
    const color = { condition: { test: asked, ...colours }, value: "currentColor" };
    const detail = { field: "method" };
    const shape = { field: "method", type: "nominal", legend: null, scale: { domain: present, range: look(data.shapes) } };
    const opacity = {
      condition: { test: asked, field: "strength", type: "quantitative", scale: null, legend: null }, value: 0.13,
    };
    const trace = { condition: { test: asked, value: 0.55 }, value: 0.08 };
    const spread = state.bands ? "datum.lead" : "false"; // intervals are for those that have colour, and on demand
    const text = { field: "label" };
    return {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json",
      description: metric + " against " + axis.replace("_", " ") + " on " + task.task,
      data: { values },
      width: "container", height: 320, background: null, autosize: { type: "fit-x", contains: "padding" },
      layer: [
        {
          data: { values: best.map((row) => ({ cost: row[axis], value: row.q[metric].value })) },
          mark: { type: "line", interpolate: "step-after", strokeWidth: 5, opacity: 0.16, color: "currentColor", aria: false },
          encoding: { x, y, order: { field: "cost" } },
        },
        {
          transform: [{ filter: spread + " && !datum.barred" }],
          mark: { type: "area", aria: false, opacity: 0.15 },
          encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color: colours },
        },
        {
          transform: [{ filter: spread + " && datum.barred" }],
          mark: { type: "rule", strokeWidth: 1.4, aria: false },
          encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color: colours },
        },
        {
          mark: { type: "line", strokeWidth: 1.4, aria: false },
          encoding: {
            x, y, color, detail, order: { field: "rung" }, opacity: trace,
          },
        },
        {
          params: [{
            name: "pointed", select: { type: "point", fields: ["method"], on: "pointerover", clear: "pointerout", nearest: false },
          }],
          mark: { type: "point", strokeWidth: 1.5, cursor: "pointer" },
          encoding: {
            x, y, color, shape, opacity, detail, description: text,
            size: { condition: { test: asked, value: 70 }, value: 26 },
            fill: {
              condition: [{ test: "datum.flagged", value: "transparent" }, { test: { not: asked }, value: "currentColor" }],
              ...colours,
            },
            tooltip: [
              { field: "method", title: "method" }, { field: "quality", title: metric }, { field: "at", title: "at" },
            ],
          },
        },
      ],
      config: {
        font: "sans-serif", view: { stroke: null },
        axis: {
          labelColor: "currentColor", titleColor: "currentColor", domainColor: "currentColor", tickColor: "currentColor",
          gridColor: "currentColor", gridOpacity: 0.12, domainOpacity: 0.5, tickOpacity: 0.5,
          labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal",
        },
      },
    };
  }

  // The tables of one machine, built as pages.py and track_pages.py build those of the first.
  const estimate = (e, unit) => {
    if (!e || e.value === null) return number(null);
    const range = element("span", "[" + figure(e.low) + ", " + figure(e.high) + "]", "sm-range");
    return cell([figure(e.value) + (unit ?? "") + " ", range], e.value, "n");
  };

  function head(task, method) {
    const name = task.methods[method];
    const anchor = element("a", name);
    anchor.href = "../methods/" + name + ".html";
    const made = element("th", anchor);
    if (task.bases[method]) anchor.title = "A variant of " + task.bases[method] + ": " + task.says[method];
    made.scope = "row";
    made.dataset.v = name;
    return made;
  }

  const MOODS = { ok: "good", incomplete: "open", flagged: "bad", failed: "bad", skipped: "" };

  function line(task, method, cells, weak) {
    const made = element("tr", cells);
    if (weak) made.classList.add("sm-weak");
    if (task.bases[method]) made.classList.add("sm-variant");
    made.dataset.training = task.training[method];
    made.dataset.tags = task.tags[method].join(",");
    return made;
  }

  function figureLines(task, rows, withEquivalents) {
    return rows.map((row) => {
      const state = cell(element("span", row.status, "sm-chip sm-" + MOODS[row.status]), row.status);
      if (row.older) state.append(" ", element("span", "older source", "sm-chip sm-open"));
      for (const note of row.notes) state.append(document.createElement("br"), element("span", note, "sm-range"));
      const triple = (name) => ({ value: row[name], low: row[name + "_low"], high: row[name + "_high"] });
      const cells = [
        head(task, row.method), number(row.rung), number(row.group),
        ...Object.keys(task.metrics).map((metric) => estimate(row.q[metric])),
        number(row.unit), ...(withEquivalents ? [number(row.nfe_equivalent)] : []),
        estimate(triple("latency_ms")), estimate(triple("speedup"), "×"), number(row.memory_mib), number(row.joules), state,
      ];
      const made = line(task, row.method, cells, row.status !== "ok");
      made.dataset.rung = row.rung;
      return made;
    });
  }

  function ladderLines(task, place) {
    const { ladders } = task;
    const costs = Object.keys(data.costs);
    return ladders.method.flatMap((method, i) => {
      if (ladders.place[i] !== place) return [];
      const tags = task.tags[method].join(", ");
      const cells = [
        head(task, method), element("td", task.training[method]), cell(element("span", tags || "–", "sm-tags"), tags),
        number(ladders.best[i]), number(ladders.rung[i]),
        ...costs.map((axis) => number(ladders["matching:" + axis][i])),
        ...costs.map((axis) => number(ladders["area:" + axis][i])),
      ];
      return [line(task, method, cells, false)];
    });
  }

  function refill(table, lines) {
    if (!table) return;
    table.tBodies[0].replaceChildren(...lines);
    table.dispatchEvent(new Event("sm:rows")); // tables.js sorts and filters them as the reader has chosen
  }

  function bind(box) {
    const task = data.tasks[box.dataset.task];
    if (!task) return;
    const rows = unpack(task);
    const metrics = Object.keys(task.metrics);
    const state = { axis: "unit", metric: metrics[0], place: 0, chosen: new Set(), bands: false, all: false };
    const live = element("div", [], "sm-live");
    const mount = element("div", [], "sm-chart");
    const note = element("p", [], "sm-note");
    note.setAttribute("aria-live", "polite");
    const legend = element("div", [], "sm-legend");
    legend.setAttribute("role", "group");
    legend.setAttribute("aria-label", "Methods");
    const here = () => rows.filter((row) => row.place === state.place);
    const drawable = (row, axis) => row.q[state.metric] && Number.isFinite(row[axis]) && row[axis] > 0;
    let view = null;
    let turn = 0;

    async function draw() {
      const mine = ++turn;
      const drawn = here().filter((row) => drawable(row, state.axis));
      const lacking = here().filter((row) => row.q[state.metric]).length - drawn.length;
      note.textContent = !drawn.length
        ? "Nothing here has a reading on this axis."
        : lacking ? lacking + " rows have no reading above nought on this axis." : "";
      drawLegend(drawn);
      view?.finalize();
      view = null;
      if (!drawn.length) {
        mount.replaceChildren();
        return;
      }
      const theme = document.body.dataset.mdColorScheme === "slate" ? "dark" : "light";
      const made = await window.vegaEmbed(mount, spec(task, drawn, state), { actions: false, renderer: "svg", tooltip: { theme } });
      if (mine !== turn) {
        made.finalize();
        return;
      }
      view = made;
      made.view.addEventListener("click", (event, item) => {
        if (item?.mark?.marktype !== "symbol" || !item.datum.href) return;
        if (event.pointerType === "touch") toggle(item.datum.method); // a finger has no other way to point
        else location.href = item.datum.href;
      });
      box.classList.add("sm-on");
    }

    function toggle(name) {
      if (!state.chosen.delete(name)) state.chosen.add(name);
      return draw();
    }

    // What leads and what was chosen stands open; the rest of the names waits until it is asked for.
    function drawLegend(drawn) {
      const present = new Set(drawn.map((row) => row.name));
      const best = front(drawn, state.axis, state.metric, task.metrics[state.metric] === "higher");
      const ahead = new Set([task.methods[task.anchors[state.place]], ...best.map((row) => row.name), ...state.chosen]);
      const button = (name) => {
        const i = task.methods.indexOf(name);
        const mark = element("span", data.marks[data.shapes[i % data.shapes.length]]);
        mark.setAttribute("aria-hidden", "true");
        mark.style.color = data.colours[i % data.colours.length];
        const button = element("button", [mark, " " + name + (task.baselines[i] ? " (baseline)" : "")]);
        button.type = "button";
        button.dataset.method = name;
        button.setAttribute("aria-pressed", String(state.chosen.has(name)));
        button.addEventListener("click", () => {
          toggle(name).then(() => legend.querySelector('[data-method="' + name + '"]')?.focus());
        });
        return button;
      };
      const shown = task.methods.filter((name) => present.has(name));
      const rest = shown.filter((name) => !ahead.has(name));
      const parts = shown.filter((name) => ahead.has(name)).map(button);
      if (rest.length) {
        const more = element("details", [element("summary", rest.length + " more"), element("div", rest.map(button))]);
        more.open = state.all;
        more.addEventListener("toggle", () => { state.all = more.open; });
        parts.push(more);
      }
      legend.replaceChildren(...parts);
    }

    function move(place) {
      state.place = Number(place);
      box.querySelector("[data-place]").textContent = task.places[state.place].name;
      box.querySelector("[data-deal] p").textContent = task.deals[state.place];
      const stick = box.querySelector("[data-yardstick]");
      if (stick) stick.textContent = task.yardsticks[state.place];
      const notes = task.reasons[state.place].map((text) => element("p", text, "sm-note"));
      box.querySelector(".sm-reasons").replaceChildren(...notes);
      const table = (label) => [...box.querySelectorAll(".sm-scroll")].find((each) => each.getAttribute("aria-label") === label)?.querySelector("table");
      refill(table("Whole ladders on " + task.task), ladderLines(task, state.place));
      const figures = table("Figures on " + task.task);
      const equivalents = [...figures.tHead.rows[0].cells].some((cell) => cell.textContent.trim() === "NFE-eq/item");
      refill(figures, figureLines(task, here(), equivalents));
      fillAxes();
    }

    // Axes that have a reading somewhere in this place.
    const axis = choice("Across", [], "", (value) => { state.axis = value; draw(); });
    function fillAxes() {
      const able = Object.keys(data.axes).filter((name) => here().some((row) => drawable(row, name)));
      const options = able.map((name) => new Option(data.axes[name].replace("{unit}", task.unit), name));
      axis.pick.replaceChildren(...options);
      if (!able.includes(state.axis)) state.axis = able[0] ?? "unit";
      axis.pick.value = state.axis;
    }

    const bar = element("div", axis.box, "sm-filter");
    fillAxes();
    if (metrics.length > 1) {
      bar.append(choice("Up", metrics.map((name) => [name, name]), state.metric, (value) => { state.metric = value; fillAxes(); draw(); }).box);
    }
    const names = [...new Set(task.places.map((place) => place.machine))];
    const tiers = [...new Set(task.places.map((place) => place.tier))];
    if (task.places.length > 1) {
      const of = (machine, tier) => {
        const exact = task.places.findIndex((place) => place.machine === machine && place.tier === tier);
        return exact >= 0 ? exact : task.places.findIndex((place) => place.machine === machine);
      };
      let machine = null;
      let tier = null;
      const act = () => {
        const place = of(machine.pick.value, tier?.pick.value ?? tiers[0]);
        if (tier) tier.pick.value = task.places[place].tier;
        move(place);
        draw();
      };
      machine = choice("Machine", names.map((name) => [name, name]), names[0], act);
      bar.append(machine.box);
      if (tiers.length > 1) {
        tier = choice("Tier", tiers.map((name) => [name, name]), task.places[0].tier, act);
        bar.append(tier.box);
      }
    }
    const tick = element("input");
    tick.type = "checkbox";
    tick.addEventListener("change", () => { state.bands = tick.checked; draw(); });
    bar.append(element("label", [tick, " 95 % intervals"]));
    live.append(bar, mount, note, legend);
    box.querySelector("[data-deal]").after(live);

    // A long page draws what comes near the screen, and once more when the scheme changes under the tooltips.
    const watch = new IntersectionObserver((seen) => {
      if (!seen.some((entry) => entry.isIntersecting)) return;
      watch.disconnect();
      draw();
      new MutationObserver(() => draw()).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
    }, { rootMargin: "600px" });
    watch.observe(live);
  }

  document.querySelectorAll(".sm-task").forEach(bind);
})();
