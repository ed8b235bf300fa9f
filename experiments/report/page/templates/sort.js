document.querySelectorAll("#runs th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentNode, column = head.cellIndex, body = document.querySelector("#runs tbody");
    var up = head.getAttribute("aria-sort") !== "ascending";
    document.querySelectorAll("#runs th[aria-sort]").forEach(function (th) { th.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    var rows = Array.from(body.rows).map(function (row) {
      var text = row.cells[column].textContent.trim().replace("−", "-");
      return { row: row, text: text, none: text === "–" || text === "", number: Number(text) };
    });
    rows.sort(function (a, b) {
      if (a.none !== b.none) { return a.none ? 1 : -1; } // what is unknown stays at the end
      var order = a.text.localeCompare(b.text, "en", { numeric: true });
      if (!isNaN(a.number) && !isNaN(b.number)) { order = a.number - b.number; }
      return up ? order : -order;
    });
    rows.forEach(function (each) { body.appendChild(each.row); });
    var said = document.getElementById("sorted");
    if (said) { said.textContent = "Sorted by " + button.textContent + ", " + head.getAttribute("aria-sort") + "."; }
  });
});
// What is folded away on a screen belongs on paper.
window.addEventListener("beforeprint", function () {
  document.querySelectorAll("details").forEach(function (part) { part.open = true; });
});
