// The picker of the home page: looks up, in data/picker.js, the method that answers what the reader chose. All text goes
// in as text, never as HTML.
(function () {
  "use strict";

  const data = window.stepmarkPicker;
  const box = document.querySelector("[data-picker]");
  if (!data || !box || !data.tracks.length) return;

  const { figure, element, choice, cell, number } = window.stepmark;
  const first = (names) => Object.keys(names)[0];
  const state = { track: 0, task: 0, keep: first(data.keep), save: "latency_ms", prepared: first(data.prepared) };

  const answer = element("div", [], "sm-answer");
  answer.setAttribute("aria-live", "polite");

  function anchor(address, text) {
    const made = element("a", text);
    made.href = address;
    return made;
  }

  const range = (e) => element("span", " [" + figure(e[1]) + ", " + figure(e[2]) + "]", "sm-range");
  const estimate = (e) => (e ? cell([figure(e[0]), range(e)], e[0], "n") : number(null));

  function numbers(task, rows, axes) {
    const head = ["Method", "Rung", task.metric + (task.better === "higher" ? " ↑" : " ↓"),
      ...axes.map((axis) => data.heads[axis])];
    const titles = head.map((text, i) => {
      const made = element("th", text, i ? "n" : "");
      made.scope = "col";
      return made;
    });
    const lines = rows.map((row, i) => {
      const name = element("th", [anchor("methods/" + row.method + ".html", row.method), row === task.rows[0] ? " (baseline)" : ""]);
      name.scope = "row";
      const cost = (axis) => (axis === "latency_ms" && row.ms ? estimate(row.ms) : number(row.costs[axis]));
      return element("tr", [name, number(row.rung), estimate(row.quality), ...axes.map(cost)]);
    });
    const table = element("table", [element("thead", element("tr", titles)), element("tbody", lines)], "sm-table");
    const scroll = element("div", table, "sm-scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "The answer in figures");
    return scroll;
  }

  function show() {
    const task = data.tracks[state.track].tasks[state.task];
    const base = task.rows[0];
    const found = task.answers[[state.keep, state.save, state.prepared].join(" ")];
    const less = data.less[state.save];
    const where = element("p", [anchor(task.page, "Every method on this task"), ". Measured on " + task.place + "."], "sm-note");
    const axes = Object.keys(data.less).filter((axis) => base.costs[axis] !== undefined || axis === state.save);
    if (!found) {
      const why = "Nothing measured keeps that for " + less + " than the baseline " + base.method + " at its best rung, " + base.rung + ".";
      answer.replaceChildren(element("p", element("b", why)), numbers(task, [base], axes), where);
      return;
    }
    const [at, times, interval] = found;
    const row = task.rows[at];
    const itself = row.method === base.method ? "the baseline itself, " : "";
    const factor = [element("b", times), element("span", interval ? " " + interval : "", "sm-range")];
    const said = element("p", [
      element("b", anchor("methods/" + row.method + ".html", row.method)), " at rung " + row.rung + ": " + itself, ...factor,
      " " + less + " than " + base.method + " at its best rung, " + base.rung + ".",
    ]);
    const prepared = {
      none: "It needs no preparation.", calibrated: "It is calibrated first", trained: "It is trained first",
    }[row.training] + (row.training === "none" ? "" : row.offline_s === null ? "." : ": " + figure(row.offline_s) + " s, once.");
    const doubt = row.trust === "disputed" ? " Its figures are disputed: see its page." : "";
    answer.replaceChildren(
      said, element("p", row.says + (row.says.endsWith(".") ? " " : ". ") + prepared + doubt), numbers(task, [row, base], axes),
      element("p", "Measure it yourself:"), element("pre", element("code", row.command)), where,
    );
  }

  const pairs = (names) => Object.entries(names);
  const task = choice("Task", [], "", (value) => { state.task = Number(value); show(); });
  function fill() {
    task.pick.replaceChildren(...data.tracks[state.track].tasks.map((each, i) => new Option(each.title, i)));
    state.task = 0;
  }
  const track = choice("Track", data.tracks.map((each, i) => [i, each.title]), 0, (value) => {
    state.track = Number(value);
    fill();
    show();
  });
  const pick = (label, name, options) => choice(label, options, state[name], (value) => { state[name] = value; show(); }).box;
  fill();
  const bar = element("div", [
    track.box, task.box, pick("I must keep", "keep", pairs(data.keep)), pick("I want", "save", pairs(data.less)),
    pick("Before it runs", "prepared", pairs(data.prepared)),
  ], "sm-filter");
  box.replaceChildren(bar, answer);
  show();
})();
