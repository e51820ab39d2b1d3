// Tables: click a heading to sort, type to filter, pick a rung or whatever else a table names in data-picks. Charts: click a name to dim the others.
(function () {
  "use strict";

  const value = (cell) => cell.dataset.v ?? cell.textContent.trim();

  function sortBy(table, column, ascending) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row, i) => ({ row, i, v: value(row.cells[column]) }));
    const numeric = rows.every(({ v }) => v === "" || !Number.isNaN(Number(v)));
    rows.sort((a, b) => {
      if ((a.v === "") !== (b.v === "")) return a.v === "" ? 1 : -1; // null figures last, whichever way
      const order = numeric ? Number(a.v) - Number(b.v) : a.v.localeCompare(b.v);
      return (ascending ? order : -order) || a.i - b.i;
    });
    body.append(...rows.map(({ row }) => row));
  }

  function prepare(table) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sortBy(table, column, ascending);
      });
    });
    // Other scripts put new rows in: they take the order and the filter that the reader chose.
    table.addEventListener("sm:rows", () => {
      const heads = [...table.tHead.rows[0].cells];
      const column = heads.findIndex((head) => head.hasAttribute("aria-sort"));
      if (column >= 0) sortBy(table, column, heads[column].getAttribute("aria-sort") === "ascending");
    });
    if (table.tBodies[0].rows.length > 8 || (table.dataset.picks && table.tBodies[0].rows.length > 1)) addFilter(table);
  }

  // What a row offers to a choice: its rung, or a list in an attribute of the choice's name.
  const offers = (row, name) => (row.dataset[name] ?? "").split(",").filter(Boolean);

  function addPick(table, bar, name) {
    const pick = document.createElement("select");
    const label = document.createElement("label");
    label.append(name[0].toUpperCase() + name.slice(1) + " ", pick);
    const fill = () => {
      const was = pick.value;
      const found = new Set([...table.tBodies[0].rows].flatMap((row) => offers(row, name)));
      const order = (a, b) => (Number.isNaN(Number(a)) ? a.localeCompare(b) : Number(a) - Number(b));
      pick.replaceChildren(new Option("any", ""), ...[...found].sort(order).map((each) => new Option(each, each)));
      pick.value = found.has(was) ? was : "";
      label.hidden = found.size < 2;
    };
    bar.append(label);
    fill();
    const asked = new URLSearchParams(location.search).get(name); // a link may ask: papers.html?tag=early-exit
    if (asked && [...pick.options].some((option) => option.value === asked)) pick.value = asked;
    return { name, pick, fill };
  }

  function addFilter(table) {
    const bar = document.createElement("div");
    bar.className = "sm-filter";
    const text = document.createElement("input");
    text.type = "search";
    text.placeholder = "Filter rows";
    text.setAttribute("aria-label", "Filter rows");
    const count = document.createElement("span");
    count.setAttribute("aria-live", "polite");
    bar.append(text);
    const picks = ["rung", ...(table.dataset.picks ?? "").split(" ").filter(Boolean)];
    const choices = picks.map((name) => addPick(table, bar, name));
    bar.append(count);
    table.closest(".sm-scroll").before(bar);
    const apply = () => {
      const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const content = row.textContent.toLowerCase();
        const fits = choices.every(({ name, pick }) => !pick.value || offers(row, name).includes(pick.value));
        row.hidden = !fits || !words.every((word) => content.includes(word));
        shown += !row.hidden;
      }
      count.textContent = shown + " of " + table.tBodies[0].rows.length + " rows";
    };
    text.addEventListener("input", apply);
    for (const { pick } of choices) pick.addEventListener("change", apply);
    table.addEventListener("sm:rows", () => {
      for (const { fill } of choices) fill();
      apply();
    });
    apply();
  }

  function bindLegend(legend) {
    const charts = legend.closest(".sm-charts");
    legend.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const pressed = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!pressed));
      const chosen = [...legend.querySelectorAll('[aria-pressed="true"]')].map((each) => each.dataset.method);
      for (const mark of charts.querySelectorAll("svg [data-method]")) {
        mark.classList.toggle("sm-dim", chosen.length > 0 && !chosen.includes(mark.dataset.method));
      }
    });
  }

  document.querySelectorAll("table.sm-table").forEach(prepare);
  document.querySelectorAll(".sm-legend").forEach(bindLegend);
})();
