// Tables: click a heading to sort, type to filter, pick a rung. Charts: click a name to dim the others.
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
    if (table.tBodies[0].rows.length > 8) addFilter(table);
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
    const rungs = [...new Set([...table.tBodies[0].rows].map((row) => row.dataset.rung).filter(Boolean))];
    let pick = null;
    if (rungs.length > 1) {
      pick = document.createElement("select");
      pick.setAttribute("aria-label", "Rung");
      pick.append(new Option("all rungs", ""), ...rungs.map((rung) => new Option("rung " + rung, rung)));
      bar.append(pick);
    }
    bar.append(count);
    table.closest(".sm-scroll").before(bar);
    const apply = () => {
      const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const content = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => content.includes(word)) || (pick?.value && row.dataset.rung !== pick.value);
        shown += !row.hidden;
      }
      count.textContent = shown + " of " + table.tBodies[0].rows.length + " rows";
    };
    text.addEventListener("input", apply);
    pick?.addEventListener("change", apply);
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
