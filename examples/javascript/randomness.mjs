// The random numbers of a private run: the same bytes as dpbitfit_fx/randomness.py, by WebCrypto, in Node and in browsers.
//
// One 32-byte secret from crypto.getRandomValues decides every draw and all noise. A stream is named by (key, purpose,
// step): HKDF-SHA256 derives an AES-256 key for that triple alone, and AES-256 in counter mode gives the bytes.

const text = new TextEncoder();
const SALT = text.encode("dpbitfit_fx/randomness/v1");
const NAME_BYTES = 256;

/** A secret key. Not even this program can read its bytes: WebCrypto holds them, not extractable. */
export class SecretKey {
  #secret;
  #insecure;

  constructor(secret, insecure) {
    this.#secret = secret;
    this.#insecure = insecure;
  }

  /** True where everybody can compute the key: NO PRIVACY. privacy.json says so. */
  get insecure() {
    return this.#insecure;
  }

  /** A fresh key from the operating system's secure generator. */
  static async generate() {
    return SecretKey.#of(crypto.getRandomValues(new Uint8Array(32)), false);
  }

  /** INSECURE: a key that everyone can compute from `seed`, to compare runs in tests. NO PRIVACY. */
  static async insecureForTests(seed) {
    const zero = await hkdfKey(new Uint8Array(32));
    const info = text.encode(`INSECURE test seed ${seed}`);
    const bits = await crypto.subtle.deriveBits({ name: "HKDF", hash: "SHA-256", salt: SALT, info }, zero, 256);
    return SecretKey.#of(new Uint8Array(bits), true);
  }

  static async #of(bytes, insecure) {
    const secret = await hkdfKey(bytes);
    bytes.fill(0);
    return new SecretKey(secret, insecure);
  }

  /** The first `count` words of the stream (purpose, step), as pairs (low, high) of 32 bits. */
  async words(purpose, step, count) {
    const info = streamName(purpose, step);
    const aes = await crypto.subtle.deriveKey(
      { name: "HKDF", hash: "SHA-256", salt: SALT, info },
      this.#secret,
      { name: "AES-CTR", length: 256 },
      false,
      ["encrypt"],
    );
    // A zero counter is safe: the derived key is used for this stream alone.
    const counter = new Uint8Array(16);
    const bytes = await crypto.subtle.encrypt({ name: "AES-CTR", counter, length: 64 }, aes, new Uint8Array(8 * count));
    const view = new DataView(bytes);
    return (index) => [view.getUint32(8 * index, true), view.getUint32(8 * index + 4, true)];
  }

  /** Float64Array of uniforms strictly inside (0, 1): k / 2^53 with k of 53 bits, and 2^-54 in place of 0. */
  async uniform(purpose, step, count) {
    const word = await this.words(purpose, step, count);
    return Float64Array.from({ length: count }, (_, i) => {
      const [low, high] = word(i);
      return Math.max(high * 2 ** 21 + (low >>> 11), 0.5) * 2 ** -53;
    });
  }

  /** Float64Array of standard normals: 52 bits of magnitude through the normal quantile, one bit of sign. */
  async normal(purpose, step, count) {
    const word = await this.words(purpose, step, count);
    return Float64Array.from({ length: count }, (_, i) => {
      const [low, high] = word(i);
      const magnitude = -lowerNormalQuantile((high * 2 ** 20 + (low >>> 12) + 0.5) * 2 ** -53);
      return low & 1 ? magnitude : -magnitude;
    });
  }
}

function hkdfKey(bytes) {
  return crypto.subtle.importKey("raw", bytes, "HKDF", false, ["deriveBits", "deriveKey"]);
}

/** Fixed-length fields: no two (purpose, step) pairs encode alike. */
function streamName(purpose, step) {
  const name = text.encode(purpose);
  const info = new Uint8Array(2 + NAME_BYTES + 8);
  const view = new DataView(info.buffer);
  view.setUint16(0, name.length);
  info.set(name, 2);
  view.setBigUint64(2 + NAME_BYTES, BigInt(step));
  return info;
}

/** The x with P(Z <= x) = p, for 0 < p <= 1/2. Wichura (1988), algorithm AS 241: relative error about 1e-16. */
export function lowerNormalQuantile(p) {
  const q = p - 0.5;
  if (q >= -0.425) {
    return q * ratio(CENTRE, 0.180625 - q * q);
  }
  const r = Math.sqrt(-Math.log(p));
  return r <= 5 ? -ratio(MIDDLE, r - 1.6) : -ratio(TAIL, r - 5);
}

/** A rational function; both polynomials from the highest power down. */
function ratio([above, below], r) {
  const value = (coefficients) => coefficients.reduce((sum, c) => sum * r + c, 0);
  return value(above) / value(below);
}

const CENTRE = [
  [
    2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
    1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.387132872796366608,
  ],
  [
    5.226495278852854561e3, 2.8729085735721942674e4, 3.930789580009271061e4, 2.1213794301586595867e4,
    5.3941960214247511077e3, 6.871870074920579083e2, 4.2313330701600911252e1, 1,
  ],
];
const MIDDLE = [
  [
    7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.4178072517745061177e-1, 1.27045825245236838258,
    3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734,
  ],
  [
    1.05075007164441684324e-9, 5.475938084995344946e-4, 1.51986665636164571966e-2, 1.4810397642748007459e-1,
    6.8976733498510000455e-1, 1.6763848301838038494, 2.05319162663775882187, 1,
  ],
];
const TAIL = [
  [
    2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.2426609473880784386e-3, 2.6532189526576123093e-2,
    2.9656057182850489123e-1, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772,
  ],
  [
    2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
    1.4875361290850148525e-2, 1.3692988092273580531e-1, 5.9983220655588793769e-1, 1,
  ],
];
