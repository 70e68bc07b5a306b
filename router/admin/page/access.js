/**
 * The admin token: from the address (`pdserve admin` shows one that ends in #token=...) or from the form.
 * It stays in this tab, leaves the address at once, and travels only in a header to this page's own server.
 */

const STORED = "pdserve admin token";

export class WrongToken extends Error {}

/** The token that this tab has, or null. */
export function knownToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(STORED, given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  return sessionStorage.getItem(STORED);
}

export function rememberToken(token) {
  sessionStorage.setItem(STORED, token);
}

export function forgetToken() {
  sessionStorage.removeItem(STORED);
}

/** `fetch` with the token; `path` is relative to this page. Throws WrongToken when the server says so. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers, authorization: `Bearer ${knownToken()}` };
  const response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  if (response.status === 401) throw new WrongToken("The server does not know this token.");
  return response;
}
