"use strict";
// Lets every table of class "sortable" be sorted by its headers; without this script they are plain
// text. A cell is compared by its data-value, else by its text. A number that nobody measured comes
// last either way. Numbers begin with the largest; a second press turns the order around.

function keyOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function compare(a, b, isNumber, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return sign * (isNumber ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
}

function sortBy(table, head, order) {
  const column = head.cellIndex;
  const isNumber = head.classList.contains("number");
  const sign = order === "ascending" ? 1 : -1;
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [keyOf(row, column), row]);
  keyed.sort((a, b) => compare(a[0], b[0], isNumber, sign)); // equal ones stay as they are
  body.append(...keyed.map(([, row]) => row));
  for (const other of head.parentElement.cells) {
    other.setAttribute("aria-sort", other === head ? order : "none");
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    if (!head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const first = head.classList.contains("number") ? "descending" : "ascending";
      const second = first === "descending" ? "ascending" : "descending";
      sortBy(table, head, head.getAttribute("aria-sort") === first ? second : first);
    });
  }
}
