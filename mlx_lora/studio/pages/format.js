// Numbers and times as words. Sizes are decimal gigabytes, as in the terminal and as a Mac tells those of disks.
const whole = new Intl.NumberFormat("en-US");
export const count = (number) => (number === null || number === undefined ? "–" : whole.format(number));
export const counted = (number, one, several = one + "s") => `${count(number)} ${number === 1 ? one : several}`;

export function bytes(size) {
  if (size === null || size === undefined) return "–";
  if (size >= 1e11) return `${Math.round(size / 1e9)} GB`;
  if (size >= 1e9) return `${(size / 1e9).toFixed(size >= 1e10 ? 1 : 2)} GB`;
  if (size >= 1e6) return `${Math.round(size / 1e6)} MB`;
  return size >= 1e3 ? `${Math.round(size / 1e3)} KB` : `${size} B`;
}

export const parameters = (number) =>
  !number ? "" : number >= 1e9 ? `${(number / 1e9).toFixed(number >= 1e10 ? 0 : 1)}B` : `${Math.round(number / 1e6)}M`;
export const rate = (number) =>
  number === null || number === undefined
    ? "–"
    : number >= 100
      ? whole.format(Math.round(number))
      : number === 0
        ? "0"
        : number.toFixed(number >= 10 ? 0 : 1);
export const loss = (number) => (number === null || number === undefined ? "–" : number.toFixed(3));
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const all = Math.max(0, Math.round(seconds));
  const hours = Math.floor(all / 3600);
  const minutes = Math.floor(all / 60) % 60;
  if (hours) return `${hours} h ${String(minutes).padStart(2, "0")} min`;
  if (minutes >= 10) return `${minutes} min`;
  return minutes ? `${minutes} min ${String(all % 60).padStart(2, "0")} s` : `${all} s`;
}

const day = new Intl.DateTimeFormat("en-US", { month: "short", day: "numeric" });
const clock = new Intl.DateTimeFormat("en-US", { hour: "numeric", minute: "2-digit" });
export function when(seconds) {
  if (!seconds) return "–";
  const then = new Date(seconds * 1000);
  return then.toDateString() === new Date().toDateString()
    ? clock.format(then)
    : `${day.format(then)}, ${clock.format(then)}`;
}

export const value = (one) =>
  one === null || one === undefined || one === ""
    ? "–"
    : one === true
      ? "on"
      : one === false
        ? "off"
        : Array.isArray(one) || typeof one === "object"
          ? JSON.stringify(one)
          : String(one);
export const shortPath = (path) => String(path || "").replace(/^\/(?:Users|home)\/[^/]+\//, "~/");
export const lastPart = (path) =>
  String(path || "")
    .split("/")
    .filter(Boolean)
    .pop() || "";
export const words = (name) => name.replaceAll("_", " ");
