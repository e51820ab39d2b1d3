// What the scripts of charts and comparisons share: figures as the rest of the site writes them, and small elements.
window.stepmark = (function () {
  "use strict";

  // Python rounds exact ties to even; toFixed rounds them up.
  function fixed(x, digits) {
    const scaled = Math.abs(x) * 10 ** digits;
    const tie = (x * 1024) % 1 === 0 && scaled % 1 === 0.5 && Math.floor(scaled) % 2 === 0;
    return tie ? ((Math.sign(x) * Math.floor(scaled)) / 10 ** digits).toFixed(digits) : x.toFixed(digits);
  }

  // The same digits as `figure` of estimates.py.
  function figure(x) {
    if (x === null || x === undefined) return "–";
    const size = Math.abs(x);
    if (x === 0) return "0";
    if (size >= 1e7 || size < 1e-3) return x.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2");
    if (size >= 1000) return fixed(x, 0).replace(/\B(?=(\d{3})+$)/g, ",");
    const text = fixed(x, size < 1 ? 4 : size < 10 ? 3 : size < 100 ? 2 : 1);
    return text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text;
  }

  // An element whose content is text or elements: never HTML.
  function element(tag, content, kind) {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...[content ?? []].flat());
    return made;
  }

  // A labelled choice.
  function choice(label, options, start, act) {
    const pick = document.createElement("select");
    for (const [value, text] of options) pick.append(new Option(text, value));
    pick.value = String(start);
    pick.addEventListener("change", () => act(pick.value));
    return { pick, box: element("label", [label + " ", pick]) };
  }

  // A cell of a table that tables.js can sort: what it shows, what it is sorted by.
  function cell(content, value, kind) {
    const made = element("td", content, kind);
    made.dataset.v = value ?? "";
    return made;
  }

  const number = (x, unit) => cell(x === null || x === undefined ? "–" : figure(x) + (unit ?? ""), x, "n");

  return { fixed, figure, element, choice, cell, number };
})();
