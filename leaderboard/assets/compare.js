// The comparison of any two methods: the paired tests that `stepmark compare` prints, computed when the site was built.
// Data comes from data/compare-<track>.js, loaded when it is asked for.
(function () {
  "use strict";

  const { element, choice, cell, number, figure, fixed } = window.stepmark;
  const index = window.stepmarkComparisons;
  const box = document.querySelector(".sm-compare");
  if (!box || !index) return;

  const state = { track: index.tracks[0].name, tier: "", a: "", b: "" };
  const loaded = new Map();

  function load(track) {
    if (!loaded.has(track)) {
      loaded.set(track, new Promise((done, failed) => {
        const tag = document.createElement("script");
        tag.src = "data/compare-" + track + ".js";
        tag.addEventListener("load", () => done(window["stepmarkComparisons_" + track]));
        tag.addEventListener("error", () => failed(new Error("data of " + track + " cannot be read")));
        document.head.append(tag);
      }));
    }
    return loaded.get(track);
  }

  const methodsOf = (track) => index.tracks.find((each) => each.name === track).methods;

  // What the address asks for, as far as it names what there is; the rest stays.
  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const [a, b] = [asked.get("a"), asked.get("b")];
    const holds = (each) => [a, b].every((name) => !name || each.methods.includes(name));
    const named = index.tracks.find((each) => each.name === asked.get("track") && holds(each));
    const track = named ?? ((a || b) && index.tracks.find(holds));
    if (track) state.track = track.name;
    const known = methodsOf(state.track);
    if (known.includes(a)) state.a = a;
    if (known.includes(b)) state.b = b;
    if (asked.get("tier")) state.tier = asked.get("tier");
    settle();
  }

  function settle() {
    const known = methodsOf(state.track);
    const { tiers, start } = index.tracks.find((each) => each.name === state.track);
    if (!known.includes(state.a)) state.a = start.find((name) => name !== state.b);
    if (!known.includes(state.b) || state.b === state.a) state.b = [...start, ...known].find((name) => name !== state.a);
    if (!tiers.includes(state.tier)) state.tier = tiers[0];
  }

  function keep() {
    const asked = new URLSearchParams({ a: state.a, b: state.b, track: state.track });
    if (state.tier !== "embedded") asked.set("tier", state.tier);
    history.replaceState(null, "", "#" + asked);
  }

  // Seen from the second method every sign turns round.
  function turned(test) {
    const minus = (x) => (x === null ? null : -x);
    return {
      ...test, difference: minus(test.difference), low: minus(test.high), high: minus(test.low), effect: minus(test.effect),
      ratio: test.ratio ? 1 / test.ratio : null, won: -test.won,
    };
  }

  function testsOf(data) {
    const [first, second] = [state.a, state.b].map((name) => data.methods.indexOf(name));
    const forward = first < second;
    const found = data.tiers[state.tier]?.[forward ? first + "," + second : second + "," + first] ?? [];
    return found.map(([task, place, rung, difference, low, high, p, effect, ratio, won]) => {
      const test = { task: data.tasks[task], place: data.places[place], rung, difference, low, high, p, effect, ratio, won };
      return forward ? test : turned(test);
    });
  }

  function median(values) {
    const sorted = [...values].sort((a, b) => a - b);
    const middle = sorted.length >> 1;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  }

  // What is flagged takes no part, and the reader is told.
  function leftOut(data) {
    const pair = [state.a, state.b].map((name) => data.methods.indexOf(name)).sort((x, y) => x - y);
    const left = data.left[state.tier]?.[pair.join(",")] ?? [];
    const said = left.map(([method, status, n]) => n + " where " + data.methods[method] + " " + (index.states[status] ?? status));
    return said.length ? " Left out of the comparison: " + said.join(", ") + "." : "";
  }

  function sentence(tests, left) {
    const { a, b } = state;
    if (!tests.length) {
      return a + " and " + b + " share no rung of a task on one machine at which they can be compared in track " + state.track + "." + left;
    }
    const count = (won) => tests.filter((test) => test.won === won).length;
    const ratios = tests.map((test) => test.ratio).filter((ratio) => ratio !== null);
    const time = ratios.length
      ? "At equal rungs " + a + " takes " + figure(median(ratios)) + " times as long as " + b + " (median)."
      : "Latency was not read for both.";
    return a + " is better than " + b + " in " + count(1) + " of " + tests.length + " comparisons, worse in " + count(-1) +
      ", and " + count(0) + " show no difference (paired bootstrap, Holm-corrected at " + index.alpha + "). " + time + left;
  }

  const table = box.querySelector("table");
  const result = box.querySelector("[data-result]");
  const command = box.querySelector("[data-command]");
  const bar = box.querySelector("[data-choices]");

  async function show() {
    let data;
    try {
      data = await load(state.track);
    } catch (error) {
      result.textContent = error.message;
      return;
    }
    const tests = testsOf(data);
    const lines = tests.map((test) => {
      const { name, metric } = test.task;
      const anchor = element("a", name);
      anchor.href = "tracks/" + state.track + ".html#" + name.replace("/", "-");
      const head = element("th", anchor);
      head.scope = "row";
      head.dataset.v = name;
      const better = test.won ? (test.won > 0 ? state.a : state.b) : "tied";
      return element("tr", [
        head, cell(test.place, test.place), number(test.rung), cell(metric, metric), number(test.difference),
        cell("[" + figure(test.low) + ", " + figure(test.high) + "]", test.low, "n"),
        cell(test.p >= 0.001 ? fixed(test.p, 3) : "<0.001", test.p, "n"), number(test.effect), cell(better, better),
        number(test.ratio),
      ]);
    });
    table.tBodies[0].replaceChildren(...lines);
    box.querySelector("[data-difference]").textContent = state.a + " − " + state.b;
    table.closest(".sm-scroll").hidden = !tests.length;
    table.dispatchEvent(new Event("sm:rows"));
    result.textContent = sentence(tests, leftOut(data));
    const tier = state.tier === "embedded" ? "" : " --tier " + state.tier;
    command.textContent = "stepmark compare " + state.a + " " + state.b + " --track " + state.track + tier;
  }

  function controls() {
    const act = (name) => (value) => {
      const was = state[name];
      state[name] = value;
      // The other method's name was chosen: the two change places.
      if (name === "a" && value === state.b) state.b = was;
      if (name === "b" && value === state.a) state.a = was;
      settle();
      keep();
      controls();
      show();
      bar.querySelector('[data-for="' + name + '"]')?.focus();
    };
    const known = methodsOf(state.track).map((name) => [name, name]);
    const { tiers } = index.tracks.find((each) => each.name === state.track);
    const add = (name, label, options) => {
      const { pick, box: made } = choice(label, options, state[name], act(name));
      pick.dataset.for = name;
      return made;
    };
    bar.replaceChildren(
      ...(index.tracks.length > 1 ? [add("track", "Track", index.tracks.map((each) => [each.name, each.title]))] : []),
      add("a", "First", known),
      add("b", "Second", known),
      ...(tiers.length > 1 ? [add("tier", "Tier", tiers.map((name) => [name, name]))] : []),
    );
  }

  function start() {
    read();
    controls();
    show();
  }

  window.addEventListener("hashchange", start);
  start();
})();
