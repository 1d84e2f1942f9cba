() => [...document.querySelectorAll("button, input, textarea, a")]
  .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length))
  .map((e) => e.outerHTML)
