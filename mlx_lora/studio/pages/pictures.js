// Pictures of a question: read from files, made small enough to send, and shown.
// A picture leaves this page as a JPEG only.
import { html, Icon } from "./parts.js";

const LONGEST_SIDE = 2048; // pixels; no model reads more of a side at once
const QUALITY = 0.92;
export const MOST = 8; // pictures of a question

// The JPEG of a file as a data URL, turned as its camera says.
export async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The file"} is no picture that this browser can read; use a PNG or JPEG file`);
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // behind transparent parts
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { name: file.name || "picture", url: canvas.toDataURL("image/jpeg", QUALITY) };
}

// A question as OpenAI's chat has it.
export const contentOf = (question, pictures) =>
  pictures.length
    ? [...pictures.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text: question }]
    : question;

export function Pictures({ pictures, onRemove }) {
  if (!pictures.length) return null;
  return html`
    <ul class="plain turn-pictures" aria-label="Pictures of the question">
      ${pictures.map(
        (one, n) => html`
          <li key=${n}>
            <img src=${one.url} alt=${one.name} />
            ${
              onRemove &&
              html`
                <button type="button" class="remove" aria-label=${`Remove ${one.name}`} onClick=${() => onRemove(n)}>
                  <${Icon} name="close" />
                </button>
              `
            }
          </li>
        `,
      )}
    </ul>
  `;
}
