// Tables in <div class="sortable"> are sorted by the column whose heading is clicked; numbers by their value.
{
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    // Not a date or a version, which begin with a number, too.
    const number = /^\d[\d,]*(\.\d+)?(?= |$)/.exec(text);
    return number ? Number(number[0].replaceAll(",", "")) : text;
  };

  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));

  for (const table of document.querySelectorAll(".sortable table")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        // Numbers begin with the largest; a second click turns the order around.
        const rows = [...table.tBodies[0].rows];
        const numbers = rows.length > 0 && typeof value(rows[0], column) === "number";
        const before = heading.getAttribute("aria-sort");
        const down = before ? before === "ascending" : numbers;
        for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        rows.sort((a, b) => compare(value(a, column), value(b, column)) * (down ? -1 : 1));
        table.tBodies[0].append(...rows);
      });
    });
  }
}
