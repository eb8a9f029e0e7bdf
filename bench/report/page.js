"use strict";
// A click or a key press on a header sorts its table: headers become buttons, and aria-sort holds the order.
// A third press restores the first order.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headers = table.tHead ? [...table.tHead.rows[0].cells] : [];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const first = header.classList.contains("text") || header.classList.contains("p") ? "ascending" : "descending";
      const second = first === "ascending" ? "descending" : "ascending";
      const next = { none: first, [first]: second, [second]: "none" }[header.getAttribute("aria-sort")];
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", next);
      body.append(...(next === "none" ? original : sorted(original, column, next === "ascending" ? 1 : -1)));
      const order = next === "none" ? "in its first order" : `sorted by ${button.textContent}, ${next}`;
      document.getElementById("said").textContent = `Table ${order}`;
    });
  });
}

// Cells without a value stay last in both orders.
function sorted(rows, column, sign) {
  const key = (row) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    return text === "\u2013" ? null : text;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  return rows
    .map((row) => [key(row), row])
    .sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)))
    .map(([, row]) => row);
}

// A checkbox shows or hides its columns in all tables. Such columns are hidden cells until then.
for (const box of document.querySelectorAll("input[data-switches]")) {
  box.addEventListener("change", () => {
    const name = box.dataset.switches;
    for (const cell of document.querySelectorAll(`[data-switch="${name}"]`)) cell.hidden = !box.checked;
    for (const other of document.querySelectorAll(`input[data-switches="${name}"]`)) other.checked = box.checked;
    fitTables();
  });
}

// A table that is wider than its box is drawn closer, and if that is not enough, each of its rows as a card.
function fitTables() {
  for (const box of document.querySelectorAll(".scroll")) {
    const table = box.firstElementChild;
    table.classList.remove("close", "closer", "cards");
    for (const look of [["close"], ["close", "closer"], ["cards"]]) {
      if (box.scrollWidth <= box.clientWidth) break;
      table.classList.remove("close", "closer");
      table.classList.add(...look);
    }
  }
}
let width = 0;
new ResizeObserver(() => {
  if (width !== innerWidth && !matchMedia("print").matches) {
    width = innerWidth;
    fitTables();
  }
}).observe(document.documentElement);

// Marks the entry of the contents whose section is on the screen.
const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  },
  { rootMargin: "-10% 0px -80% 0px" },
);
for (const name of links.keys()) watcher.observe(document.getElementById(name));
